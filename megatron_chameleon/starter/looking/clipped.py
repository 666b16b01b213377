"""A file that seems to end after some bytes, so that looking at it takes a bounded time."""

import io
from dataclasses import dataclass, field
from typing import IO, cast

from megatron_chameleon.data.inputs.files import InputFile

_HEAD_BYTES = 2 << 20
"""The beginning of a file can always be read: it says what kind of file it is."""


class _Clipped(io.RawIOBase):
    """A file that seems to end where the clip does."""

    def __init__(self, file: IO[bytes], clip: "Clip") -> None:
        self._file, self._clip = file, clip

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        place = self._file.tell()
        # a reader of lines looks at the byte before its range
        end = self._clip.end if place >= self._clip.start - 1 else _HEAD_BYTES
        data = self._file.read(max(min(len(buffer), end - place), 0))
        if place + len(data) >= self._clip.end:
            self._clip.was_hit = True
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class Clip:
    """Which bytes may be read."""

    start: int
    end: int
    was_hit: bool = False
    """Whether the end was reached."""


@dataclass(frozen=True)
class ClippedInput(InputFile):
    """An input of which at most some bytes are read."""

    clip: Clip = field(default_factory=lambda: Clip(0, 0), compare=False)

    @classmethod
    def of(cls, item: InputFile, start: int, most_bytes: int) -> "ClippedInput":
        """The bytes of an input from a place on."""
        values = (item.path, item.kind, item.compression, item.size_bytes, item.signature)
        return cls(*values, Clip(start, start + most_bytes))

    def open(self) -> IO[bytes]:
        """The file, which seems to end where the clip does."""
        return cast(IO[bytes], io.BufferedReader(_Clipped(super().open(), self.clip)))
