"""A process that has imported the libraries once and forks the real command on request.

Starting Python and importing PyTorch, megatron-core and transformers costs 6 to 16 seconds per
process; a fork costs a moment. ``run_command.run_chameleon`` starts one such server per test
process and sends it requests. Tests of launchers start processes of their own instead.

A request is one line of JSON on standard input: ``words`` behind ``chameleon``, ``processes``,
``environment``, ``folder`` (the working directory), ``stdout`` and ``stderr`` (paths), ``timeout``
in seconds, and ``file_bytes``, a limit on the size of files, or null. The answer is one line with
the exit code, or null after the timeout.

``{"import": module}`` makes the server import one more module, for a file whose every command needs
it; the answer is 0.

With ``background``, the answer is the number of the one process, and comes at once. Its exit code
is the answer to ``{"wait": number, "timeout": seconds}``.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

IMPORTS = (
    "megatron_chameleon.checkpoint.convert.run",
    "megatron_chameleon.checkpoint.formats.hf",
    "megatron_chameleon.data.preprocess.run",
    "megatron_chameleon.inference.session",
    "megatron_chameleon.tokenizer.image.training.train",
    "megatron_chameleon.tokenizer.text.training",
    "megatron_chameleon.training.loop",
    "megatron_chameleon.training.engines.megatron",
)
GRACE_SECONDS = 30
"""As torchrun gives to the other processes after one has failed."""


def serve() -> None:
    """Answer requests until standard input ends."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    for module in IMPORTS:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may be taken for an answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(request: dict[str, Any]) -> int | None:
    """Do what a request asks for."""
    if "import" in request:
        importlib.import_module(request["import"])
        return 0
    if "wait" in request:
        return wait([request["wait"]], request["timeout"])
    port = free_port()
    running = [_fork(request, rank, port) for rank in range(request["processes"])]
    if request.get("background"):
        return running[0]
    return wait(running, request["timeout"])


def wait(running: list[int], timeout: float) -> int | None:
    """Wait for processes: the exit code of the job, or None after the timeout."""
    processes = len(running)
    deadline = time.monotonic() + timeout
    codes: list[int] = []
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
                if codes[-1] and running:  # torchrun ends the others too
                    _signal(running, signal.SIGTERM)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if running and time.monotonic() > deadline:
            _signal(running, signal.SIGKILL)
            for child in running:
                os.waitpid(child, 0)
            return next(filter(None, codes), None)
        time.sleep(0.005)
    if processes > 1:
        return int(any(codes))  # torchrun's own exit code
    return codes[0]


def _signal(children: list[int], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, number)


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        _enter(request, rank, port)
        code = run_main(request["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the server's clean-up


def _enter(request: dict[str, Any], rank: int, port: int) -> None:
    """Take over the request's working directory, environment and words."""
    os.chdir(request["folder"])
    if request["file_bytes"] is not None:
        limit = request["file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ.clear()
    os.environ.update(request["environment"])
    become_rank(rank, request["processes"], port)
    sys.argv = [str(Path(sys.executable).with_name("chameleon")), *request["words"]]


def become_rank(rank: int, processes: int, port: int) -> None:
    """Set the variables that torchrun would set; nothing for a process that is alone."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (place | meeting).items()})


def run_main(words: list[str]) -> int:
    """Run the command on one thread and return its exit code. A crash is raised."""
    import torch

    from megatron_chameleon.cli.main import main

    torch.set_num_threads(1)
    try:
        main(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def free_port() -> int:
    """A TCP port of this machine that nothing listens on.

    It lies below those that the system gives to outgoing connections, one of which could take it
    before the command listens. It is drawn at random, because several servers draw at a time.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


if __name__ == "__main__":
    serve()
