"""Reads tables of text: CSV and TSV, whose first row names the columns.

Each row becomes a line of JSON, which the parser of lines reads: a record of texts, without the
cells that are empty. Lists and objects, which a cell can only hold as JSON, are read as such in the
columns of ``_JSON_COLUMNS``.
"""

import csv
import json
from collections.abc import Iterator
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile, check_signature
from megatron_chameleon.data.inputs.decoding.compression import decompressed
from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.data.inputs.form_keys import FORM_KEYS, LINK_KEYS
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    Fault,
    FileBlock,
    fault_of_rest,
    tell,
    too_large,
)
from megatron_chameleon.errors import DataError

BLOCK_ROWS = 256
BLOCK_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_DELIMITERS = ("\t", ",", ";")
_JSON_COLUMNS = frozenset(
    ("messages", "conversations", "content", "images", "texts", "text_list", "image_info")
)


def table_blocks(item: InputFile, file: IO[bytes], done: int, limit: int) -> Iterator[FileBlock]:
    """Blocks of the rows that follow the first ``done`` ones; the row of names is not counted.

    A row that cannot be used is a ``Fault``.

    Args:
        item: The file.
        file: The open file.
        done: Rows that an earlier run has read.
        limit: Most bytes of a row.
    """
    row, waiting, size = 0, list[bytes](), 0
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    try:
        lines = _lines(item, file, limit)
        first = next(lines, "").removeprefix("\ufeff")
        names = _names(first)
        reader = csv.reader(lines, delimiter=_delimiter(first), strict=True)
        while (found := _next_row(reader, names, item, row, limit)) is not None:
            row += 1
            if row <= done:
                continue
            is_line = isinstance(found, bytes)
            if waiting and (not is_line or len(waiting) == BLOCK_ROWS or size > BLOCK_BYTES):
                yield _block(waiting, row - 1, tell(file, item))
                waiting, size = [], 0
            if isinstance(found, Fault):
                yield FileBlock(found, row - 1, row, row, tell(file, item))
            else:
                waiting.append(found)
                size += len(found)
        if waiting:
            yield _block(waiting, row, tell(file, item))
    except BrokenFile as error:
        if waiting:
            yield _block(waiting, row, tell(file, item))
        fault = fault_of_rest(error, item.path, f"after row {row}")
        yield FileBlock.last(fault, max(row, done), item.size_bytes)


def _block(rows: list[bytes], row: int, read_bytes: int) -> FileBlock:
    return FileBlock(b"\n".join(rows), row - len(rows), row, row, read_bytes)


def _lines(item: InputFile, file: IO[bytes], limit: int) -> Iterator[str]:
    """The lines of the file. Bytes that are not UTF-8 become lone surrogates.

    Raises:
        BrokenFile: The file breaks off, is of another kind, or has a line beyond the limit.
    """
    chunks = (
        iter(lambda: file.read(_READ_BYTES), b"")
        if item.compression is None
        else decompressed(file, item.compression)
    )
    rest, is_first = b"", True
    for chunk in chunks:
        if is_first:
            check_signature(chunk)
            is_first = False
        *whole, rest = (rest + chunk).replace(b"\0", b"").split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "surrogateescape") + "\n"
        if len(rest) > limit:
            raise BrokenFile(f"a line has more than {limit >> 20} MiB", "Check the file's quotes")
    if rest:
        yield rest.decode("utf-8", "surrogateescape")


def _delimiter(first: str) -> str:
    """What stands between cells: whichever of tab, comma and semicolon the first row has most."""
    return max(_DELIMITERS, key=first.count)


def _names(first: str) -> list[str]:
    """The columns' names.

    Raises:
        BrokenFile: They name nothing that is read.
    """
    names = [name.strip() for name in next(csv.reader([first], delimiter=_delimiter(first)), [])]
    if not (set(names) & set(FORM_KEYS) or {name.lower() for name in names} & set(LINK_KEYS)):
        what = f"its first row names no column {', '.join(FORM_KEYS)} (it has "
        what += f"{', '.join(names)[:200]!r}), so it seems to be a row of the table"
        remedy = "Write a first row with the names of the columns, such as image,caption"
        if "://" in first:
            remedy += "; for a table of links to pictures, run img2dataset first"
        raise BrokenFile(what, remedy)
    return names


def _next_row(
    reader: Any, names: list[str], item: InputFile, row: int, limit: int
) -> bytes | Fault | None:
    """The next row as a line of JSON; None at the end."""
    where, name = f"{item.path}:{row + 1}", f"{item.name}:{row + 1}"
    try:
        cells = next((cells for cells in reader if cells), None)
    except csv.Error as error:
        what = f"the row is not valid CSV ({error})"
        return Fault(DataError(where, what, "Check its quotes"), BROKEN_DOCUMENT, name)
    if cells is None:
        return None
    if len(cells) != len(names):
        what = f"the row has {len(cells)} cells, but the first row names {len(names)} columns"
        return Fault(DataError(where, what, "Check its quotes"), BROKEN_DOCUMENT, name)
    size = sum(map(len, cells))
    if size > limit:
        return too_large(where, f"the row has {size >> 20} MiB", limit, name)
    record = {key: _value(key, cell) for key, cell in zip(names, cells, strict=True) if cell}
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        fault = DataError(where, "the row is not UTF-8", "Write the table as UTF-8")
        return Fault(fault, BROKEN_DOCUMENT, name)


def _value(key: str, cell: str) -> Any:
    if key in _JSON_COLUMNS and cell[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell
