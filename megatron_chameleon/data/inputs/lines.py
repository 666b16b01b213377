"""Lines of plain and compressed files, about a megabyte of whole ones at a time."""

from collections.abc import Iterator
from typing import IO

from megatron_chameleon.data.inputs.files import Input, Span
from megatron_chameleon.data.inputs.records import (
    BLOCK_IMAGES,
    BROKEN_DOCUMENT,
    BROKEN_FILE,
    BrokenFile,
    Fault,
    FileSlice,
    Piece,
    Position,
    decompressed,
    tell,
)
from megatron_chameleon.errors import DataError

BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20
"""Room for a document with embedded images; a longer line is none."""
_IMAGE_MARKS = b'"image"'
"""Twice in an image part, as type and as key."""


def line_pieces(item: Input, span: Span, file: IO[bytes], here: Position) -> Iterator[Piece]:
    """Lines of the span from ``here`` on."""
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
