"""Reads plain and compressed files of lines, about a megabyte of whole lines at a time.

A ``.json`` file that is an array, or values of several lines each, is read too: ``json_values.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile, check_signature
from megatron_chameleon.data.inputs.decoding.compression import decompressed
from megatron_chameleon.data.inputs.decoding.json_values import Value, ValueCutter, depth_of_records
from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.records import (
    BLOCK_IMAGES,
    Fault,
    FileBlock,
    FileSlice,
    Position,
    fault_of_rest,
    tell,
    too_large,
)

BLOCK_BYTES = 1 << 20
_IMAGE_MARKS = b'"image'
"""Occurs twice in each image part: as its type and as its key."""


@dataclass(frozen=True)
class _Records:
    """Consecutive records of the file."""

    content: bytes | None
    """One record per line; None for a single long one that is not kept in memory."""
    count: int
    end: int
    """Bytes of the file up to their end."""
    size: int
    """Bytes in the file."""


def line_blocks(
    item: InputFile, part: InputRange, file: IO[bytes], start: Position, limit: int
) -> Iterator[FileBlock]:
    """The records of a range, from a position on.

    Args:
        item: The file.
        part: Which bytes of it to read.
        file: The open file.
        start: Where an earlier run ended.
        limit: Most bytes of a record.
    """
    offset, record = start.offset, start.record
    if offset is None:
        offset, record = _first_line(file, part.start) if part.start else (0, 0)
    is_plain = item.compression is None
    try:
        head, chunks = _open_chunks(item, file, offset)
        outer = _check_head(item, head)
        by_worker = is_plain and not item.is_remote and outer is None
        if outer is None:
            kept = BLOCK_BYTES if by_worker else limit  # a worker reads a long line itself
            found = _cut_lines(chunks, offset, part.stop, kept)
        else:
            found = _cut_values(chunks, ValueCutter(outer, offset, limit))
        for records in found:
            after = record + records.count
            payload: bytes | FileSlice | Fault | None = records.content
            if records.count == 1 and records.size > limit:
                payload = _long_record(item, after, records.size, limit)
            elif by_worker:
                payload = FileSlice(records.end - records.size, records.size)
            read = records.end if is_plain else tell(file, item)
            yield FileBlock(payload, record, after, records.end, read)
            record = after
    except BrokenFile as error:
        fault = fault_of_rest(error, f"{item.path}:{record + 1}", "here")
        yield FileBlock.last(fault, record, item.size_bytes)


def _long_record(item: InputFile, number: int, size: int, limit: int) -> Fault:
    where, name = f"{item.path}:{number}", f"{item.name}:{number}"
    return too_large(where, f"the line has {size >> 20} MiB", limit, name)


def _check_head(item: InputFile, head: bytes) -> int | None:
    """How many brackets are open around each record, or None for lines.

    Raises:
        BrokenFile: The file is of another kind than its name says.
    """
    check_signature(head)
    outer = depth_of_records(head)
    if item.kind == "json":
        return outer
    if outer == 1:
        raise BrokenFile("the file is one JSON array", "Let its name end with .json")
    return None


# Chunks


def _open_chunks(item: InputFile, file: IO[bytes], offset: int) -> tuple[bytes, Iterator[bytes]]:
    """The beginning of the content, and all of it from an offset on, about a megabyte at a time."""
    if item.compression is None:
        file.seek(0)
        head = file.read(BLOCK_BYTES)
        return head, _plain(file, offset)
    pieces = _megabytes(decompressed(file, item.compression))
    head = next(pieces, b"")
    return head, _without_first(chain([head], pieces), offset)


def _plain(file: IO[bytes], offset: int) -> Iterator[bytes]:
    file.seek(offset)
    while chunk := file.read(BLOCK_BYTES):
        yield chunk


def _megabytes(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Join chunks; what was read before a file breaks off comes first."""
    parts: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            parts.append(chunk)
            size += len(chunk)
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    except BrokenFile:
        if parts:
            yield b"".join(parts)
        raise
    if parts:
        yield b"".join(parts)


def _without_first(chunks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """The chunks without the first ``offset`` bytes."""
    for chunk in chunks:
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(offset - len(chunk), 0)


# Records


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


def _cut_lines(
    chunks: Iterator[bytes], offset: int, stop: int | None, limit: int
) -> Iterator[_Records]:
    """Whole lines from ``offset`` on; a line that begins in an earlier chunk may come alone.

    Args:
        chunks: The content from ``offset`` on.
        offset: A place in the file where a line begins.
        stop: Lines that begin here or later are not read.
        limit: Of a longer line nothing is kept.
    """
    waiting = _UnfinishedLine(limit)
    for chunk in chain(chunks, [b""]):
        if stop is not None and offset >= stop:
            return
        first = chunk.find(b"\n") + 1
        if chunk and not first:
            waiting.add(chunk)
            continue
        if waiting.size + first > limit:
            line = waiting.finish(chunk[:first], offset)
            yield line
            offset, chunk = line.end, chunk[first:]
        if stop is not None and offset >= stop:
            return
        end = chunk.rfind(b"\n") + 1
        lines = waiting.take() + chunk[:end]
        if stop is not None and offset + len(lines) >= stop:
            lines = lines[: lines.find(b"\n", stop - 1 - offset) + 1 or len(lines)]
        for some in _split_by_images(lines):
            offset += len(some)
            count = some.count(b"\n") + (not some.endswith(b"\n"))
            yield _Records(some, count, offset, len(some))
        waiting.add(chunk[end:])


class _UnfinishedLine:
    """The beginning of a line in earlier chunks; nothing is kept of a line beyond the limit."""

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self._limit:
            self._parts.clear()
        else:
            self._parts.append(part)

    def take(self) -> bytes:
        """The beginning; the next line has none."""
        content = b"".join(self._parts)
        self._parts.clear()
        self.size = 0
        return content

    def finish(self, part: bytes, offset: int) -> _Records:
        """The line that begins at ``offset`` and ends with ``part``, without its content."""
        size = self.size + len(part)
        self.take()
        return _Records(None, 1, offset + size, size)


def _cut_values(chunks: Iterator[bytes], cutter: ValueCutter) -> Iterator[_Records]:
    """The records of an array, or values in a row; one that is too long comes alone."""
    waiting: list[Value] = []
    try:
        for chunk in chunks:
            for value in cutter.feed(chunk):
                if value.content is None:
                    yield from _lines_of(waiting)
                    waiting = []
                    yield _Records(None, 1, value.end, value.size)
                else:
                    waiting.append(value)
            if sum(value.size for value in waiting) >= BLOCK_BYTES:
                yield from _lines_of(waiting)
                waiting = []
        cutter.finish()
    except BrokenFile:
        yield from _lines_of(waiting)
        raise
    yield from _lines_of(waiting)


def _lines_of(values: Sequence[Value]) -> Iterator[_Records]:
    """Values as lines, in batches of at most ``BLOCK_IMAGES`` images."""
    begin = images = 0
    for at, value in enumerate(values):
        assert value.content is not None
        images += value.content.count(_IMAGE_MARKS)
        if at + 1 == len(values) or images >= 2 * BLOCK_IMAGES:
            some = values[begin : at + 1]
            lines = b"\n".join(value.content or b"" for value in some)
            yield _Records(lines, len(some), value.end, sum(value.size for value in some))
            begin, images = at + 1, 0


def _split_by_images(content: bytes) -> Iterator[bytes]:
    """Split lines into batches of at most ``BLOCK_IMAGES`` images; a line is never split."""
    if content.count(_IMAGE_MARKS) <= 2 * BLOCK_IMAGES:
        if content:
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
