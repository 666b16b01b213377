"""What the readers of input files yield: blocks of records, and the positions that follow them.

Positions count bytes of lines after decompression, samples of a tar, and rows of a parquet file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile
from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.errors import DataError

BLOCK_IMAGES = 32
"""Most images of one block, so that a relaunch repeats little work."""

BROKEN_FILE = "broken file"
BROKEN_DOCUMENT = "broken document"
TOO_LARGE_DOCUMENT = "too large document"


@dataclass(frozen=True)
class Limits:
    """What one document may have, whatever its file says; more is a ``Fault``."""

    document_bytes: int = 128 << 20
    """Bytes of a line, tar sample or parquet row: as many as an image may have
    (``--largest-document``)."""
    text_bytes: int = 16 << 20
    """Bytes of text. Encoding takes about 30 times as much memory (``--largest-text``)."""


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


def too_large(where: str, what: str, limit: int, name: str = "") -> Fault:
    """The fault of a document that is larger than a document may be.

    Args:
        where: File and line, sample or row.
        what: What is too large, with the number, such as "the line has 300 MiB".
        limit: The limit in bytes.
        name: The document's id.
    """
    what = f"{what}, more than the {limit / (1 << 20):g} MiB of --largest-document"
    remedy = "Split or remove it, or raise --largest-document"
    return Fault(DataError(where, what, remedy), TOO_LARGE_DOCUMENT, name)


def too_long_text(where: str, size: int, limit: int) -> Fault:
    """The fault of a document with more bytes of text than a document may have."""
    what = f"the document has {size >> 20} MiB of text, more than the "
    what += f"{limit / (1 << 20):g} MiB of --largest-text"
    remedy = "Split or remove it, or raise --largest-text"
    return Fault(DataError(where, what, remedy), TOO_LARGE_DOCUMENT)


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


def fault_of_rest(error: BrokenFile, where: str, place: str) -> Fault:
    """The fault of the rest of a file.

    Args:
        error: Why it is lost.
        where: The file, and the line if there are lines.
        place: Where the rest begins, such as "after sample 3".
    """
    what, remedy = str(error), error.remedy
    if not remedy:
        what = f"the file breaks off {place}, the rest of it is lost ({error})"
        remedy = "Copy or write the file again"
    return Fault(DataError(where, what, remedy), BROKEN_FILE)


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
    ends_file: bool = False
    """Whether nothing more of the file can be read."""

    @classmethod
    def last(cls, fault: "Fault", record: int, size_bytes: int) -> "FileBlock":
        """The block of a fault that ends a file before its end."""
        return cls(fault, record, record, record, size_bytes, ends_file=True)


def tell(file: IO[bytes], item: InputFile) -> int:
    """How many bytes of a file have been read."""
    return min(file.tell(), item.size_bytes)
