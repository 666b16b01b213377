"""Reads plain and compressed files of lines, about a megabyte of whole lines at a time."""

from collections.abc import Iterator
from typing import IO

from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.records import (
    BLOCK_IMAGES,
    BROKEN_DOCUMENT,
    BROKEN_FILE,
    BrokenFile,
    Fault,
    FileBlock,
    FileSlice,
    Position,
    decompressed,
    tell,
)
from megatron_chameleon.errors import DataError

BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20
"""Enough for a document with embedded images; a longer line cannot be a document."""
_IMAGE_MARKS = b'"image"'
"""Occurs twice in each image part: as its type and as its key."""


def line_blocks(
    item: InputFile, part: InputRange, file: IO[bytes], start: Position
) -> Iterator[FileBlock]:
    """The lines of a range, from a position on."""
    offset, record = start.offset, start.record
    if offset is None:
        offset, record = _first_line(file, part.start) if part.start else (0, 0)
    is_plain = item.compression is None
    chunks = _plain(file, offset) if is_plain else _unpacked(item, file, offset)
    for begin, content in _cut_lines(chunks, offset, part.stop):
        if not isinstance(content, bytes):
            fault = _fault(f"{item.path}:{record + 1}", content)
            yield FileBlock(fault, record, record + 1, begin, tell(file, item))
            record += 1
            continue
        for lines in _split_by_images(content):
            count = lines.count(b"\n") + (not lines.endswith(b"\n"))
            end = begin + len(lines)
            payload = FileSlice(begin, len(lines)) if is_plain and not item.is_remote else lines
            read = end if is_plain else tell(file, item)
            yield FileBlock(payload, record, record + count, end, read)
            begin, record = end, record + count


def _fault(where: str, error: "BrokenFile | TooLong") -> Fault:
    if isinstance(error, BrokenFile):
        what = f"the file breaks off here, the rest of it is lost ({error})"
        return Fault(DataError(where, what, "Copy or write the file again"), BROKEN_FILE)
    what = f"the line is longer than {LONGEST_LINE_BYTES >> 20} MiB"
    return Fault(DataError(where, what, "Write one document per line"), BROKEN_DOCUMENT)


def _first_line(file: IO[bytes], start: int) -> tuple[int, int]:
    """The offset of the first line that starts at or after ``start``, and how many lines precede.

    The line that covers the byte before ``start`` belongs to the previous range.
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
    """Stands for a line longer than ``LONGEST_LINE_BYTES``."""


def _cut_lines(
    chunks: Iterator[bytes], offset: int, stop: int | None
) -> Iterator[tuple[int, bytes | BrokenFile | TooLong]]:
    """Whole lines from ``offset`` on, about ``BLOCK_BYTES`` at a time, each batch with its offset.

    A line that is too long, and the end of a broken file, come with the offset that follows them.
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
    """``rest`` plus at least one chunk, whether more may follow, and how the file broke off."""
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


def _unpacked(item: InputFile, file: IO[bytes], offset: int) -> Iterator[bytes]:
    for chunk in decompressed(item, file):
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(offset - len(chunk), 0)


def _skip_line(chunks: Iterator[bytes], offset: int, buffer: bytes) -> tuple[int, bytes]:
    """Skip the rest of a line that is too long: the offset after it, and the bytes read beyond."""
    while True:
        offset += len(buffer)
        try:
            buffer = next(chunks, b"")
        except BrokenFile:
            buffer = b""
        end = buffer.find(b"\n") + 1
        if end or not buffer:
            return offset + end, buffer[end:]


def _split_by_images(content: bytes) -> Iterator[bytes]:
    """Split lines into batches of at most ``BLOCK_IMAGES`` images; a line is never split."""
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
