"""Cuts a .json file that is not JSON Lines into records: an array's elements, or values in a row.

Data sets are often one array, and some writers spread each object over several lines. Both are read
as a stream. Only brackets, quotation marks and commas are looked at here; each record becomes one
line, which the parser of lines checks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile
from megatron_chameleon.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_OUTSIDE_STRINGS = re.compile(rb'["\[\]{},]')
_IN_STRINGS = re.compile(rb'["\\]')
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NO_LIMIT = 1 << 62

MOST_VALUES = 1 << 20
"""Values in one document. Two bytes of JSON become 60 bytes of memory and more, so a line of a
permitted length could still take gigabytes."""
_SMALL_BYTES = 4 << 20
"""Lines up to this size are parsed without a look at their values."""


def check_values(line: bytes, where: str) -> None:
    """Refuse a line of JSON that would take far more memory than its size.

    Raises:
        DataError: It has more than ``MOST_VALUES`` values.
    """
    if len(line) <= _SMALL_BYTES or _count_values(line) <= MOST_VALUES:
        return
    count = _count_values(_STRING.sub(b"", line))
    if count > MOST_VALUES:
        what = f"the line has {count:,} values, more than the {MOST_VALUES:,} of a document"
        raise DataError(where, what, "Split or remove it")


def _count_values(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def depth_of_records(head: bytes) -> int | None:
    """How many brackets are open around each record of a .json file.

    Args:
        head: The beginning of the file.

    Returns:
        1 if the file is an array, 0 if it is values of several lines each, and None if each line is
        a record.
    """
    head = head.removeprefix(BYTE_ORDER_MARK).lstrip(_SPACE)
    line, newline, rest = head.partition(b"\n")
    cutter = ValueCutter(0, 0, _NO_LIMIT)
    is_whole = bool(list(cutter.feed(line)))
    if head.startswith(b"["):  # a line may be a list, but then more lines follow
        return None if is_whole and rest.strip(_SPACE) else 1
    is_open = bool(newline) and not is_whole and not cutter.in_string
    return 0 if head.startswith(b"{") and is_open else None


@dataclass(frozen=True)
class Value:
    """One record of the file."""

    content: bytes | None
    """Its JSON on one line, without a newline; None if it is longer than a record may be."""
    size: int
    """Its bytes in the file, and the space around it."""
    end: int
    """Bytes of the file up to its end."""


class ValueCutter:
    """Finds the records in chunks of a file.

    Args:
        outer: How many brackets are open around each record, 0 or 1.
        offset: Bytes of the file before the first chunk: 0, or the end of a record.
        limit: Most bytes of a record; of a longer one nothing is kept.
    """

    def __init__(self, outer: int, offset: int, limit: int) -> None:
        self.outer = outer
        self.depth = 0 if offset == 0 else outer
        self.in_string = False
        self._escaped = False
        self._closed = False
        self._limit = limit
        self._offset = offset
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Value]:
        """The records that end in this chunk.

        Raises:
            BrokenFile: Something follows the array.
        """
        begin = at = 0
        while (found := self._next_mark(chunk, at)) is not None:
            at = found + 1
            mark = chunk[found:at]
            if mark in b"[{":
                self.depth += 1
                if self.depth == self.outer:
                    begin = at
            elif mark in b"]}":
                self.depth -= 1
                if self.depth < self.outer:
                    yield from self._end(chunk[begin:found], found)
                    self._closed, begin = True, at
                elif self.depth == self.outer == 0:
                    yield from self._end(chunk[begin:at], at)
                    begin = at
            elif self.depth == self.outer == 1:  # a comma between two elements
                yield from self._end(chunk[begin:found], found)
                begin = at
        self._keep(chunk[begin:])
        self._offset += len(chunk)

    def finish(self) -> None:
        """Check the end of the file.

        Raises:
            BrokenFile: It ends within a record or before the end of the array.
        """
        if self.outer and not self._closed:
            raise BrokenFile("the array does not end")
        if self._size and b"".join(self._parts).strip(_SPACE):
            raise BrokenFile("the last value does not end")

    def _next_mark(self, chunk: bytes, at: int) -> int | None:
        """The next bracket or comma outside strings, from ``at`` on."""
        while at < len(chunk):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            found = (_IN_STRINGS if self.in_string else _OUTSIDE_STRINGS).search(chunk, at)
            if found is None:
                return None
            at = found.end()
            if found[0] == b'"':
                self.in_string = not self.in_string
            elif self.in_string:
                self._escaped = True
            else:
                return found.start()
        return None

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._closed:
            if part.strip(_SPACE):
                raise BrokenFile("something follows the array")
        elif self._size > self._limit:
            self._parts = []
        else:
            self._parts.append(part)

    def _end(self, part: bytes, at: int) -> Iterator[Value]:
        """The record that ends at the place ``at`` of the chunk, unless there is only space."""
        self._keep(part)
        size = self._size
        content = b"".join(self._parts).strip(_SPACE) if size <= self._limit else None
        self._parts, self._size = [], 0
        if content is None:
            yield Value(None, size, self._offset + at)
        elif content:
            line = content.removeprefix(BYTE_ORDER_MARK).replace(b"\n", b" ").replace(b"\r", b" ")
            yield Value(line, size, self._offset + at)
