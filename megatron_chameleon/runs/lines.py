"""Read files of JSON lines that a run writes, whatever a crash or an editor has left in them.

A run may be writing the file, so its last line may be incomplete: that is no fault. Any other line
that is not an object is counted, and the first ones are named.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import cannot_read, open_to_read
from megatron_chameleon.json_text import parse_json
from megatron_chameleon.wording import counted

LONGEST_LINE_BYTES = 1 << 22
"""The record of a step has some hundred bytes per source and layer."""
LONGEST_SKIP_BYTES = 1 << 28
"""How much is passed over in search of a line's end; behind that, it is no file of lines."""
LARGEST_STEP = 10**15
MOST_NAMED = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


@dataclass
class BrokenLines:
    """The lines of a file that were passed over."""

    path: Path
    count: int = 0
    first: list[DataError] = field(default_factory=list)
    """The first few, each with its line number."""
    is_cut: bool = False
    """Whether the last line is incomplete: a process is writing it, or died while it did."""
    is_given_up: bool = False
    """Whether the rest of the file was not read, because it has no lines."""

    def add(self, number: int, what: str) -> None:
        """Count a line, numbered from 1."""
        self.count += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(DataError(f"{self.path}:{number}", what, "Fix or remove the line"))

    def __str__(self) -> str:
        """All of them in a line; empty if there are none."""
        if not self.count:
            return ""
        rest = "; the rest of the file was not read" if self.is_given_up else ""
        first = self.first[0]
        number = first.where.rpartition(":")[2]
        verb = "was" if self.count == 1 else "were"
        lines = counted(self.count, "line")
        return (
            f"{lines} of {self.path.name} {verb} left out; the first is line {number}, which "
            f"{first.what}{rest}"
        )


def read_objects(
    path: Path, broken: BrokenLines, *, has_step: bool = True
) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in their order.

    Args:
        path: The file.
        broken: Takes what is passed over.
        has_step: Whether each object must have a whole number from 0 as ``step``.

    Raises:
        DataError: There is no such file, or the disk cannot read it.
    """
    for number, line in _lines(path, broken):
        text = line.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else line.strip()
        if not text:
            continue
        found = parse_object(text, has_step)
        if isinstance(found, dict):
            yield found
        elif line.endswith(b"\n"):
            broken.add(number, found)
        else:
            broken.is_cut = True


def parse_object(text: bytes, has_step: bool = True) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it, such as "is not valid JSON (...)"."""
    try:
        value = orjson.loads(text)
    except ValueError:  # NaN, for example, which json reads
        try:
            value = parse_json(text.decode("utf-8", "replace"), "")
        except DataError as error:
            return error.what
    step = value.get("step") if isinstance(value, dict) else None
    if has_step and (type(step) is not int or not 0 <= step <= LARGEST_STEP):
        return "is not the record of a step, which is an object with an integer `step`"
    return value if isinstance(value, dict) else "is not an object"


def read_backwards(path: Path, has_step: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a file from its end to its begin; lines that are none are passed over.

    The caller stops when it has enough. A file that has grown since then is not followed.

    Args:
        path: The file. If there is none, or it cannot be read, there are no objects.
        has_step: As for ``read_objects``.
    """
    try:
        file = open_to_read(path)
    except DataError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            try:
                file.seek(begin)
                block = file.read(end - begin)
            except OSError:
                return
            first, *lines = (block + rest).split(b"\n")
            for line in reversed(lines):
                if line.strip() and isinstance(found := parse_object(line, has_step), dict):
                    yield found
            end, rest = begin, first if len(first) <= LONGEST_LINE_BYTES else b""
        text = rest.removeprefix(_BYTE_ORDER_MARK)
        if text.strip() and isinstance(found := parse_object(text, has_step), dict):
            yield found


def _lines(path: Path, broken: BrokenLines) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, without those that are too long."""
    number = 0
    with open_to_read(path) as file:
        try:
            while line := file.readline(LONGEST_LINE_BYTES):
                number += 1
                if len(line) < LONGEST_LINE_BYTES or line.endswith(b"\n"):
                    yield number, line
                    continue
                broken.add(number, f"has {LONGEST_LINE_BYTES} bytes or more")
                skipped = 0
                while (more := file.readline(_BLOCK_BYTES)) and not more.endswith(b"\n"):
                    skipped += len(more)
                    if skipped > LONGEST_SKIP_BYTES:
                        broken.is_given_up = True
                        return
        except OSError as error:
            raise cannot_read(path, error) from error
