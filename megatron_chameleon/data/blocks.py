"""Inputs cut into blocks of whole records, each with the position to go on from behind it.

The process that reads hands blocks to those that encode. Where the blocks are cut changes no byte
of the output. A block of lines holds about a megabyte, and no more than ``BLOCK_IMAGES`` images, so
that a relaunch does not repeat much. Positions count bytes of lines after decompression, samples of
a tar and rows of a parquet file; to go on within a compressed file, what is before is decompressed
and thrown away.

A file that breaks off gives its whole records and then a ``Fault``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from megatron_chameleon.data.inputs import Input, Span
from megatron_chameleon.errors import DataError

BLOCK_BYTES = 1 << 20
BLOCK_IMAGES = 32
LONGEST_LINE_BYTES = 64 << 20
"""Room for a document with embedded images; a longer line is none."""
_READ_BYTES = 1 << 16
"""Compressed files are always read in such steps, so that a broken one breaks in one place."""
_IMAGE_MARKS = b'"image"'
"""Twice in an image part, as type and as key."""

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


def read_blocks(
    inputs: Sequence[Input], spans: Sequence[Span], position: Position | None = None
) -> Iterator[Block]:
    """The blocks of all spans from a position on.

    Raises:
        DataError: When a file cannot be opened, or a disk or network fails.
    """
    position = position or Position()
    before = sum(span.size_bytes for span in spans[: position.span])
    for number, span in enumerate(spans[position.span :], start=position.span):
        item = inputs[span.input]
        here = position if number == position.span else Position(number)
        try:
            with item.open() as file:
                yield from _blocks_of(item, span, file, number, here, before)
        except OSError as error:
            what = f"cannot read on ({' '.join(str(error).split())})"
            raise DataError(item.path, what, "Check the disk or network, then go on") from error
        before += span.size_bytes


def _blocks_of(
    item: Input, span: Span, file: IO[bytes], number: int, here: Position, before: int
) -> Iterator[Block]:
    """The blocks of one span, from ``here`` on."""
    if item.kind == "lines":
        pieces = _lines(item, span, file, here)
    elif item.kind == "tar":
        from megatron_chameleon.data.tar_blocks import tar_pieces

        pieces = tar_pieces(item, file, here.record)
    else:
        from megatron_chameleon.data.parquet_blocks import parquet_pieces

        pieces = parquet_pieces(item, span, file, here.record)
    first_byte = span.start if item.kind == "lines" else 0
    for piece in pieces:
        read_bytes = before + max(piece.read_bytes - first_byte, 0)
        after = Position(number, piece.offset, piece.record_after, read_bytes)
        if isinstance(piece.payload, Fault) and piece.payload.reason == BROKEN_FILE:
            after = Position(number + 1, read_bytes=before + span.size_bytes)
        yield Block(item.path, span.input, piece.record, after, piece.payload)


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


# Lines


def _lines(item: Input, span: Span, file: IO[bytes], here: Position) -> Iterator[Piece]:
    offset, record = here.offset, here.record
    if offset is None:
        offset, record = _first_line(file, span.start) if span.start else (0, 0)
    is_plain = item.compression is None
    chunks = _plain(file, offset) if is_plain else _unpacked(item, file, offset)
    for start, content in _cut_lines(chunks, offset, span.stop):
        if not isinstance(content, bytes):
            fault = _fault(f"{item.path}:{record + 1}", content)
            yield Piece(fault, record, record + 1, start, tell(file, item))
            record += 1
            continue
        for piece in _few_images(content):
            lines = piece.count(b"\n") + (not piece.endswith(b"\n"))
            end = start + len(piece)
            payload = FileSlice(start, len(piece)) if is_plain and not item.is_remote else piece
            read = end if is_plain else tell(file, item)
            yield Piece(payload, record, record + lines, end, read)
            start, record = end, record + lines


def _fault(where: str, error: "BrokenFile | TooLong") -> Fault:
    if isinstance(error, BrokenFile):
        what = f"the file breaks off here, the rest of it is lost ({error})"
        return Fault(DataError(where, what, "Copy or write the file again"), BROKEN_FILE)
    what = f"a line of more than {LONGEST_LINE_BYTES >> 20} MiB"
    return Fault(DataError(where, what, "Write one document a line"), BROKEN_DOCUMENT)


def tell(file: IO[bytes], item: Input) -> int:
    """How far a file was read; what decompresses it closes it at its end."""
    return item.size_bytes if file.closed else file.tell()


def _first_line(file: IO[bytes], start: int) -> tuple[int, int]:
    """Where the first line begins that starts at ``start`` or behind it, and how many are before.

    The line that covers the byte before belongs to the span before.
    """
    file.seek(0)
    record, left = 0, start - 1
    while left > 0 and (data := file.read(min(BLOCK_BYTES, left))):
        record, left = record + data.count(b"\n"), left - len(data)
    offset = start - 1
    while line := file.readline(BLOCK_BYTES):
        offset += len(line)
        if line.endswith(b"\n"):
            break
    return offset, record + 1


class TooLong:
    """In the place of a line of more than ``LONGEST_LINE_BYTES``."""


def _cut_lines(
    chunks: Iterator[bytes], offset: int, stop: int | None
) -> Iterator[tuple[int, bytes | BrokenFile | TooLong]]:
    """Whole lines from ``offset`` on, about ``BLOCK_BYTES`` of them at a time, with their offset.

    A line that is too long, and the end of a broken file, come with the offset behind them.
    """
    rest, more = b"", True
    while more and (stop is None or offset < stop):
        rest, more, broken = _fill(rest, chunks)
        end = rest.rfind(b"\n") + 1 if more or broken else len(rest)
        if stop is not None and offset + end >= stop:
            end = rest.find(b"\n", max(stop - 1 - offset, 0)) + 1 or end
        if end:
            yield offset, rest[:end]
            offset, rest = offset + end, rest[end:]
        elif len(rest) > LONGEST_LINE_BYTES:
            offset, rest = _skip_line(chunks, offset, rest)
            yield offset, TooLong()
        if broken:
            yield offset, broken


def _fill(rest: bytes, chunks: Iterator[bytes]) -> tuple[bytes, bool, BrokenFile | None]:
    """``rest`` and at least one more chunk; whether there may be more; how the file broke off."""
    parts, size = [rest], len(rest)
    while size < BLOCK_BYTES or len(parts) == 1:
        try:
            chunk = next(chunks, b"")
        except BrokenFile as error:
            return b"".join(parts), False, error
        if not chunk:
            return b"".join(parts), False, None
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts), True, None


def _plain(file: IO[bytes], offset: int) -> Iterator[bytes]:
    file.seek(offset)
    while chunk := file.read(BLOCK_BYTES):
        yield chunk


def _unpacked(item: Input, file: IO[bytes], offset: int) -> Iterator[bytes]:
    for chunk in decompressed(item, file):
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(offset - len(chunk), 0)


def decompressed(item: Input, file: IO[bytes]) -> Iterator[bytes]:
    """The content of a compressed file in steps of ``_READ_BYTES``.

    Raises:
        BrokenFile: When it breaks off or is damaged.
    """
    import pyarrow

    assert item.compression is not None
    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file), item.compression) as stream:
            while chunk := stream.read(_READ_BYTES):
                yield chunk
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise BrokenFile(" ".join(str(error).split())) from error


def _skip_line(chunks: Iterator[bytes], offset: int, buffer: bytes) -> tuple[int, bytes]:
    """Go on to behind the end of a line that is too long."""
    while True:
        offset += len(buffer)
        try:
            buffer = next(chunks, b"")
        except BrokenFile:
            buffer = b""
        end = buffer.find(b"\n") + 1
        if end or not buffer:
            return offset + end, buffer[end:]


def _few_images(content: bytes) -> Iterator[bytes]:
    """Whole lines with no more than ``BLOCK_IMAGES`` images together, if a line has no more."""
    if content.count(_IMAGE_MARKS) <= 2 * BLOCK_IMAGES:
        yield content
        return
    waiting: list[bytes] = []
    images = 0.0
    for line in content.splitlines(keepends=True):
        count = line.count(_IMAGE_MARKS) / 2
        if waiting and images + count > BLOCK_IMAGES and waiting[-1].endswith(b"\n"):
            yield b"".join(waiting)
            waiting, images = [], 0.0
        waiting.append(line)
        images += count
    yield b"".join(waiting)
