"""A real ``chameleon serve``, forked from the warm command server, that runs while a test talks."""

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from run_command import ask_server, environment

READY_SECONDS = 120


@dataclass
class RunningServer:
    """A server that answers."""

    port: int
    pid: int
    stdout: Path
    stderr: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def send(self, data: bytes, seconds: float = 10) -> bytes:
        """What comes back over a connection for these bytes, until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            sock.sendall(data)
            return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            data += part
    return data


@contextlib.contextmanager
def running_server(
    folder: Path, *words: object, **variables: str
) -> Iterator[tuple[RunningServer, list[int]]]:
    """A server, and a list that gets its exit code at the end of the block.

    Args:
        folder: For what it prints.
        words: Behind ``chameleon serve``; a free port is added.
        variables: Of its environment.
    """
    outputs = {name: folder / name for name in ("stdout", "stderr")}
    for path in outputs.values():
        path.write_bytes(b"")
    request = {
        "words": ["serve", *map(str, words), "--port", "0"],
        "processes": 1,
        "environment": environment(**variables),
        "folder": str(folder),
        "file_bytes": None,
        "background": True,
        **{name: str(path) for name, path in outputs.items()},
    }
    pid = ask_server(request)
    codes: list[int] = []
    try:
        yield RunningServer(_port(outputs), pid, **outputs), codes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        code = ask_server({"wait": pid, "timeout": 30})
        assert code is not None, "the server does not end"
        codes.append(code)


def _port(outputs: dict[str, Path]) -> int:
    deadline = time.monotonic() + READY_SECONDS
    while not (found := re.search(r"^page: .*:(\d+)/$", outputs["stdout"].read_text(), re.M)):
        assert time.monotonic() < deadline, outputs["stderr"].read_text()
        time.sleep(0.02)
    return int(found[1])
