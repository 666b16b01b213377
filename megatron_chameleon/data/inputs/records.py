"""What readers of files give to those who encode: blocks of records, and positions behind them.

Positions count bytes of lines after decompression, samples of a tar and rows of a parquet file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from megatron_chameleon.data.inputs.files import Input
from megatron_chameleon.errors import DataError

BLOCK_IMAGES = 32
"""Of one block, so that a relaunch does not repeat much."""
READ_BYTES = 1 << 16
"""Compressed files are always read in such steps, so that a broken one breaks in one place."""

BROKEN_FILE = "broken file"
BROKEN_DOCUMENT = "broken document"


@dataclass(frozen=True)
class Position:
    """Where to go on: behind a block."""

    span: int = 0
    """Number of the span."""
    offset: int | None = None
    """Bytes, samples or rows of the file before it; None: the start of the span."""
    record: int = 0
    """Lines, samples or rows of the file before it."""
    read_bytes: int = 0
    """Bytes of all spans before it, as they lie on the disk; for the progress line."""


@dataclass(frozen=True)
class FileSlice:
    """Bytes of a local file that whoever parses them reads himself."""

    offset: int
    size: int


@dataclass(frozen=True)
class Samples:
    """Samples of a tar: suffix to bytes, and ``__key__``."""

    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """Rows of a parquet file."""

    stream: bytes
    """One record batch as an Arrow IPC stream: it carries these rows alone, however they were
    sliced."""


@dataclass(frozen=True)
class Fault:
    """A document, or the rest of a file, that cannot be read."""

    error: DataError
    reason: str
    """A few words, the same for all of a kind: they are counted."""
    id: str = ""
    source: str = ""


@dataclass(frozen=True)
class Block:
    """Records in a row of one input."""

    path: str
    input: int
    """Number of the input."""
    record: int
    """Records of the file before it."""
    after: Position
    payload: Any
    """bytes or ``FileSlice`` of lines, ``Samples`` of a tar, ``Rows`` of a parquet file, or a
    ``Fault``."""


class BrokenFile(Exception):
    """Raised by what decodes a file, with the cause."""


@dataclass(frozen=True)
class Piece:
    """What a reader of one kind of file gives: a payload and the position behind it."""

    payload: Any
    record: int
    """Records of the file before it."""
    record_after: int
    offset: int
    """Bytes, samples or rows of the file up to its end."""
    read_bytes: int
    """Bytes of the file read so far, as they lie on the disk."""


def tell(file: IO[bytes], item: Input) -> int:
    """How far a file was read; what decompresses it closes it at its end."""
    return item.size_bytes if file.closed else file.tell()


def decompressed(item: Input, file: IO[bytes]) -> Iterator[bytes]:
    """The content of a compressed file in steps of ``READ_BYTES``.

    Raises:
        BrokenFile: When it breaks off or is damaged.
    """
    import pyarrow

    assert item.compression is not None
    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file), item.compression) as stream:
            while chunk := stream.read(READ_BYTES):
                yield chunk
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise BrokenFile(" ".join(str(error).split())) from error
