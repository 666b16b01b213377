"""Run the real command in processes forked from one that has already imported the libraries.

Starting Python takes 6 to 16 seconds each time; a fork takes a moment.
"""

import os
import sys
import traceback
from pathlib import Path

import megatron_chameleon.training.engines.megatron  # noqa: F401
from command_server import become_rank, free_port, run_main


def start(words: list[str], log: Path, processes: int = 1) -> list[int]:
    """Start ``chameleon WORDS`` on this many processes, as torchrun would.

    Args:
        words: The words after ``chameleon``.
        log: The output of the processes is appended to it.
        processes: How many; each gets a rank.

    Returns:
        The process ids, for ``os.waitpid``.
    """
    port = free_port()
    return [_fork(words, log, rank, processes, port) for rank in range(processes)]


def run(words: list[str], log: Path, processes: int = 1) -> None:
    """Start the processes and wait for them.

    Raises:
        AssertionError: One of them failed; the message has the end of their output.
    """
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in start(words, log, processes)]
    assert not any(codes), f"{codes}: {log.read_text()[-3000:]}"


def _fork(words: list[str], log: Path, rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        become_rank(rank, processes, port)
        code = run_main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips the clean-up of the parent
