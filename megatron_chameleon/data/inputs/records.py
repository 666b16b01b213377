"""What the readers of input files yield: blocks of records, and the positions that follow them.

Positions count bytes of lines after decompression, samples of a tar, and rows of a parquet file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.errors import DataError

BLOCK_IMAGES = 32
"""Most images of one block, so that a relaunch repeats little work."""
READ_BYTES = 1 << 16
"""Compressed files are always read in steps of this size, so that a broken file always breaks off
at the same place."""

BROKEN_FILE = "broken file"
BROKEN_DOCUMENT = "broken document"


@dataclass(frozen=True)
class Position:
    """Where to resume: right after a block."""

    range_index: int = 0
    """Index in the list of input ranges."""
    offset: int | None = None
    """Bytes, samples or rows of the file before the position; None: the start of the range."""
    record: int = 0
    """Lines, samples or rows of the file before the position."""
    read_bytes: int = 0
    """Bytes on disk of everything read before the position; for the progress line."""

    def to_json(self) -> dict[str, int | None]:
        """The position as the state file of an unfinished run holds it."""
        return {
            "span": self.range_index,
            "offset": self.offset,
            "record": self.record,
            "read_bytes": self.read_bytes,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Position":
        """The inverse of ``to_json``."""
        values = dict(content)
        return cls(range_index=values.pop("span"), **values)


@dataclass(frozen=True)
class FileSlice:
    """Bytes of a local file, to be read by the process that parses them."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarSamples:
    """Samples of a tar; each maps suffixes to bytes, and ``__key__`` to the key."""

    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class ParquetRows:
    """Rows of a parquet file."""

    stream: bytes
    """One record batch as an Arrow IPC stream. It carries these rows alone, whatever batch they
    were sliced from."""
    unread: tuple[str, ...] = ()
    """Columns of the file that can hold neither text nor a picture."""


@dataclass(frozen=True)
class Fault:
    """A document, or the rest of a file, that cannot be read."""

    error: DataError
    reason: str
    """A few words that are the same for all faults of a kind: they are counted."""
    id: str = ""
    corpus_name: str = ""


@dataclass(frozen=True)
class Block:
    """Consecutive records of one input."""

    path: str
    input: int
    """Index of the input."""
    record: int
    """Records of the file before the block."""
    after: Position
    payload: Any
    """Lines as bytes or as a ``FileSlice``, ``TarSamples``, ``ParquetRows``, or a ``Fault``."""


class BrokenFile(Exception):
    """Raised with the cause by the code that decodes a file."""


@dataclass(frozen=True)
class FileBlock:
    """What the reader of one kind of file yields; ``blocks.py`` makes a ``Block`` of it."""

    payload: Any
    """As in ``Block``."""
    record: int
    """Records of the file before the block."""
    record_after: int
    """Records of the file up to the end of the block."""
    offset: int
    """Bytes, samples or rows of the file up to the end of the block."""
    read_bytes: int
    """Bytes on disk of the file that have been read so far."""


def tell(file: IO[bytes], item: InputFile) -> int:
    """How many bytes of a file have been read; a decompressor closes the file at its end."""
    return item.size_bytes if file.closed else file.tell()


def decompressed(item: InputFile, file: IO[bytes]) -> Iterator[bytes]:
    """The content of a compressed file in steps of ``READ_BYTES``.

    Raises:
        BrokenFile: If it breaks off or is damaged.
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
