"""Run the real command: in a process of its own, in several, or forked from a warm server."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from places import PROGRAMS, REPOSITORY, SUPPORT

TIMEOUT_SECONDS = 240


def environment(**variables: str) -> dict[str, str]:
    """The variables of a test's process: one thread, and none of the caller's launcher variables.

    This checkout comes first on the path, then the helpers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in names}
    path = os.pathsep.join(map(str, (REPOSITORY, SUPPORT, PROGRAMS)))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def command(*words: object, processes: int = 1) -> list[str]:
    """The words that start ``chameleon WORDS`` on so many processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "-m", "megatron_chameleon", *(str(word) for word in words)]


@functools.cache
def command_server() -> subprocess.Popen[str]:
    """The command server of this test process; it ends with this process's end of the pipe."""
    return subprocess.Popen(
        [sys.executable, SUPPORT / "command_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def run_chameleon(
    *words: object,
    processes: int = 1,
    succeeds: bool = True,
    launched: bool = False,
    file_bytes: int | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in processes that the command server forks.

    Args:
        words: What follows ``chameleon``.
        processes: Ranks of the job; each gets the variables that torchrun would set.
        succeeds: Whether an exit code other than 0 fails the test.
        launched: Start Python, and torchrun for several processes, instead of the server's forks:
            for tests of what torchrun prints, or of how the command starts.
        file_bytes: The largest size of a file, beyond which a write fails as on a full disk; not
            for what is launched.
        variables: Of the environment, in addition.
    """
    text = [str(word) for word in words]
    if launched:
        result = _launch(text, processes, variables)
    else:
        result = _fork(text, processes, variables, file_bytes)
    if succeeds:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def run_jobs(program: str, jobs: Sequence[Mapping[str, Any]], folder: Path, seconds: int) -> None:
    """Run a program of ``programs/`` that takes a file of jobs and a folder for its results."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAMS / program, folder / "jobs.json", folder],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def warm_server(module: str) -> None:
    """Let the command server import a module, which all commands after this then have.

    For a test file whose commands would each import a large library.
    """
    assert ask_server({"import": module}) == 0


def ask_server(request: Mapping[str, Any]) -> Any:
    """The command server's answer to a request; see ``command_server.py``."""
    server = command_server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the command server has ended"
    return json.loads(answer)


def _launch(
    words: list[str], processes: int, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words, processes=processes),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(**variables),
    )


def _fork(
    words: list[str], processes: int, variables: dict[str, str], file_bytes: int | None
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="chameleon-") as folder:
        outputs = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        for path in outputs.values():
            Path(path).touch()
        request = {
            "words": words,
            "processes": processes,
            "environment": environment(**variables),
            "folder": str(Path.cwd()),
            "timeout": TIMEOUT_SECONDS,
            "file_bytes": file_bytes,
            **outputs,
        }
        code = ask_server(request)
        texts = {name: Path(path).read_text(errors="replace") for name, path in outputs.items()}
    assert code is not None, f"no end after {TIMEOUT_SECONDS} s: {texts['stderr'][-4000:]}"
    return subprocess.CompletedProcess(words, code, **texts)
