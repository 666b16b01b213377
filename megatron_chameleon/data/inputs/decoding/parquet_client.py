"""Runs ``parquet_process.py``, which decodes parquet and Arrow within a limit of memory."""

import contextlib
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile

PROGRAM = Path(__file__).with_name("parquet_process.py")
MEMORY_PER_BYTE = 4
"""Memory of the process for each byte of the largest row: a page, and buffers that double."""
LEAST_MEMORY_BYTES = 256 << 20
_FRAME = struct.Struct(">cQ")
"""As in ``parquet_process.py``, which is not imported because it imports Arrow."""
_END_SECONDS = 5


class ParquetFault(BrokenFile):
    """A file, or a row group of it, that cannot be decoded."""


class ParquetClient:
    """A parquet or Arrow file that another process decodes; use it as a context.

    Args:
        path: The file; None if only this process can open it.
        file: The same, open.
        size_bytes: Its size.
        largest_bytes: Most bytes of a row.
        kind: parquet or arrow.

    Raises:
        ParquetFault: From all methods, if the file cannot be decoded. The client is then closed.
        OSError: From all methods, if the disk or network fails.
    """

    def __init__(
        self,
        path: str | None,
        file: IO[bytes],
        size_bytes: int,
        largest_bytes: int,
        kind: str = "parquet",
    ) -> None:
        self._kind = kind
        self._path = path
        self._file = file
        self._size_bytes = size_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._memory_bytes = max(MEMORY_PER_BYTE * largest_bytes, LEAST_MEMORY_BYTES)
        self.group_rows: list[int] = []
        """Rows of each row group, as the file says."""
        self.schema: Any = None
        """Arrow's schema."""

    def __enter__(self) -> "ParquetClient":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the process and open the file, unless it is open."""
        import pyarrow

        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for this process; the other one ends with its pipe
        )
        self._send(
            path=None if self._path is None else str(Path(self._path).resolve()),
            size_bytes=self._size_bytes,
            kind=self._kind,
            memory_bytes=self._memory_bytes,
        )
        self.group_rows = json.loads(self._receive()[1])
        self.schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(self._receive()[1]))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it did not take is not needed
                if stream is not None:
                    stream.close()
        process.wait()

    def rows(self, **request: Any) -> Iterator[tuple[bytes, bytes]]:
        """Messages ``B``, ``L`` and ``X`` of rows of one row group.

        Args:
            request: The arguments of ``parquet_process._rows``.
        """
        self.open()
        self._send(**request)
        while (message := self._receive())[0] != b"D":
            yield message

    def _send(self, **content: Any) -> None:
        self._write(json.dumps(content).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _receive says how the process ended
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _receive(self) -> tuple[bytes, bytes]:
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        while True:
            header = stream.read(_FRAME.size)
            kind, size = _FRAME.unpack(header) if len(header) == _FRAME.size else (b"", 0)
            content = stream.read(size)
            if not kind or len(content) < size:
                raise self._fault_of_end()
            if kind == b"E":
                raise self._fault_of(json.loads(content))
            if kind != b"R":
                return kind, content
            offset, size = json.loads(content)
            self._file.seek(offset)
            data = self._file.read(size)
            self._write(data + bytes(size - len(data)))

    def _fault_of(self, error: dict[str, Any]) -> Exception:
        self.close()
        if error["errno"] is not None:
            return OSError(error["errno"], error["cause"])
        return self._needs_memory() if error["needs_memory"] else ParquetFault(error["cause"])

    def _fault_of_end(self) -> ParquetFault:
        """The fault of a file at which the process has died."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        code = self._process.poll()
        self.close()
        if code == -signal.SIGABRT:  # what C++ does when memory cannot be had
            return self._needs_memory()
        name = signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
        return ParquetFault(f"Arrow ended with {name}")

    def _needs_memory(self) -> ParquetFault:
        size = self._memory_bytes >> 20
        return ParquetFault(
            f"it takes more than {size} MiB of memory, {MEMORY_PER_BYTE} times --largest-document"
        )
