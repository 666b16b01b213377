"""Reads the rows of parquet and Arrow files: all columns that could hold text or pictures.

Another process decodes them, within a limit of memory (``parquet_client.py``). Where that fails,
the rows before the fault are read one by one, and reading goes on with the next row group.
"""

import json
from collections.abc import Collection, Iterator
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile
from megatron_chameleon.data.inputs.decoding.json_values import MOST_VALUES
from megatron_chameleon.data.inputs.decoding.parquet_client import ParquetClient, ParquetFault
from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.form_keys import (
    FORM_KEYS,
    LINK_KEYS,
    PICTURE_KEY,
    WEIGHT_KEY,
)
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    BROKEN_FILE,
    TOO_LARGE_DOCUMENT,
    Fault,
    FileBlock,
    Limits,
    ParquetRows,
    fault_of_rest,
    too_large,
    too_long_text,
)
from megatron_chameleon.errors import DataError

INTERLEAVED_ROWS = 16
TEXT_ROWS = 256
MOST_FAULTS = 8
"""Row groups of a file that may be damaged; after more, the rest of the file is lost."""
_MOST_SINGLE_ROWS = 20_000
"""Rows are read one by one, which is slow, only up to this row of a row group."""


def parquet_blocks(
    item: InputFile,
    part: InputRange,
    file: IO[bytes],
    done: int,
    limits: Limits,
    columns: Collection[str] = (),
) -> Iterator[FileBlock]:
    """Record batches of a range's rows.

    Args:
        item: The file.
        part: Which rows of it to read.
        file: The open file.
        done: Rows of the file to skip, because an earlier run has read them.
        limits: What a row may have.
        columns: More columns to read, in lower case.
    """
    row = max(done, part.start)
    try:
        with _client(item, file, limits) as client:
            yield from _Rows(item, client, limits, columns).blocks(row, part.stop)
    except BrokenFile as error:
        fault = fault_of_rest(error, item.path, f"after row {row}")
        yield FileBlock.last(fault, row, item.size_bytes)


def _client(item: InputFile, file: IO[bytes], limits: Limits) -> ParquetClient:
    path = None if item.is_remote else item.path
    return ParquetClient(path, file, item.size_bytes, limits.document_bytes, item.kind)


class _Rows:
    """The rows of one open file.

    Args:
        item: The file.
        client: The same, open.
        limits: What a row may have.
        columns: More columns to read, such as one of numbers, in lower case.

    Raises:
        BrokenFile: It has none of the columns that are read.
    """

    def __init__(
        self,
        item: InputFile,
        client: ParquetClient,
        limits: Limits,
        columns: Collection[str] = (),
    ) -> None:
        self._item = item
        self._client = client
        self._limits = limits
        self._columns, self._unread = _columns(client.schema, columns)
        self._text_columns = _text_columns(client.schema, self._columns)
        self._total = sum(client.group_rows)
        self._faults = 0

    def blocks(self, row: int, stop: int | None) -> Iterator[FileBlock]:
        """The blocks of the rows [row, stop); groups before them are not decoded."""
        first, end = 0, self._total if stop is None else min(stop, self._total)
        for group, count in enumerate(list(self._client.group_rows)):
            low, high = max(row - first, 0), min(end - first, count)
            if low < high:
                yield from self._group(group, first, low, high)
            if self._faults > MOST_FAULTS:
                return
            first += count

    def _group(self, group: int, first: int, low: int, high: int) -> Iterator[FileBlock]:
        """The rows [low, high) of a row group whose own first row is ``first``."""
        batch_rows = _batch_rows(self._client.schema, self._columns)
        while low < high:
            try:
                for kind, content in self._client.rows(
                    group=group,
                    first=low,
                    stop=high,
                    batch_rows=batch_rows,
                    columns=self._columns,
                    limits=[self._limits.document_bytes, MOST_VALUES, self._limits.text_bytes],
                    text_columns=self._text_columns,
                ):
                    block = self._block(kind, content, first + low)
                    low = block.record_after - first
                    yield block
                if low < high:
                    raise ParquetFault("it has fewer rows than the file says")
            except ParquetFault as error:
                if batch_rows > 1 and low < _MOST_SINGLE_ROWS:
                    batch_rows = 1
                    continue
                yield self._lost_rows(first + low, first + high, error)
                return

    def _block(self, kind: bytes, content: bytes, row: int) -> FileBlock:
        if kind == b"L":
            fault = _large_row(f"{self._item.path}:{row + 1}", self._limits, *json.loads(content))
            return self._file_block(fault, row, row + 1)
        if kind == b"X":
            what = f"the row is damaged ({content.decode(errors='replace')})"
            error = DataError(f"{self._item.path}:{row + 1}", what, "Write the row again")
            return self._file_block(Fault(error, BROKEN_DOCUMENT), row, row + 1)
        count, stream = int.from_bytes(content[:8], "big"), content[8:]
        return self._file_block(ParquetRows(stream, tuple(self._unread)), row, row + count)

    def _lost_rows(self, row: int, end: int, error: ParquetFault) -> FileBlock:
        self._faults += 1
        name = f"{self._item.path}:{row + 1}"
        what = f"rows {row + 1} to {end}, the rest of a row group, are lost ({error})"
        remedy = "Copy or write the file again, with smaller row groups if they are large"
        if self._faults > MOST_FAULTS:
            what = f"the rest of the file is lost: {self._faults} row groups are damaged ({error})"
            end = self._total
        return self._file_block(Fault(DataError(name, what, remedy), BROKEN_FILE), row, end)

    def _file_block(self, payload: Any, row: int, end: int) -> FileBlock:
        read = self._item.size_bytes * end // max(self._total, 1)
        return FileBlock(payload, row, end, end, read)


def _large_row(where: str, limits: Limits, size: int, values: int, text_bytes: int) -> Fault:
    if size > limits.document_bytes:
        return too_large(where, f"the row has {size >> 20} MiB", limits.document_bytes)
    if text_bytes > limits.text_bytes:
        return too_long_text(where, text_bytes, limits.text_bytes)
    what = f"the row has {values:,} values, more than the {MOST_VALUES:,} of a document"
    return Fault(DataError(where, what, "Split or remove it"), TOO_LARGE_DOCUMENT)


def _text_columns(schema: Any, columns: list[str]) -> list[str]:
    """The columns of strings that are not pictures in base64."""
    import pyarrow

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    are_text = (name for name in columns if is_text(schema.field(name).type))
    return [name for name in are_text if not PICTURE_KEY.fullmatch(name)]


def _batch_rows(schema: Any, columns: list[str]) -> int:
    fields = [schema.field(name) for name in columns]
    has_pictures = "images" in columns or any(_holds_bytes(field.type) for field in fields)
    return INTERLEAVED_ROWS if has_pictures else TEXT_ROWS


def _columns(schema: Any, more: Collection[str]) -> tuple[list[str], list[str]]:
    """The columns to read, and those that can hold neither text nor a picture."""
    names: list[str] = schema.names
    if not (set(FORM_KEYS) & set(names) or set(LINK_KEYS) & {name.lower() for name in names}):
        what = f"has no column {', '.join(FORM_KEYS)} (it has {', '.join(names)[:200]})"
        remedy = "Write a column text or messages, or the parallel list columns images and texts"
        raise BrokenFile(what, remedy)
    named = {"id", "source", WEIGHT_KEY, *FORM_KEYS, *filter(PICTURE_KEY.fullmatch, names)}
    named |= {name for name in names if name.lower() in more}
    read = [n for n in names if n in named or _holds_texts(schema.field(n).type)]
    return read, [name for name in names if name not in read]


def _holds_texts(kind: Any) -> bool:
    """Whether a column can hold strings or bytes, at any depth."""
    import pyarrow

    if pyarrow.types.is_nested(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return any(_holds_texts(field.type) for field in fields)
    if pyarrow.types.is_dictionary(kind):
        return _holds_texts(kind.value_type)
    is_of = pyarrow.types
    return not (is_of.is_primitive(kind) or is_of.is_null(kind) or is_of.is_decimal(kind))


def _holds_bytes(kind: Any) -> bool:
    """Whether a column can hold the bytes of files, at any depth."""
    import pyarrow

    if pyarrow.types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def row_borders(item: InputFile, start: int, stop: int | None) -> tuple[int, int | None] | None:
    """The rows of the row groups that begin in the bytes [start, stop) of a file.

    Row groups are assumed to be equally large. A file that cannot be opened belongs to the shard
    that has its first byte.

    Returns:
        The first row and the row after the last one (None: the end of the file); None if no row
        group begins there.
    """
    try:
        with item.open() as file, _client(item, file, Limits()) as client:
            rows = client.group_rows
    except (ParquetFault, OSError):
        return (0, None) if start == 0 else None
    groups = len(rows)
    if not groups:
        return (0, None) if start == 0 else None
    begins = [item.size_bytes * group // groups for group in range(groups)]
    end = item.size_bytes if stop is None else stop
    mine = [group for group in range(groups) if start <= begins[group] < end]
    if not mine:
        return None
    last = None if mine[-1] == groups - 1 else sum(rows[: mine[-1] + 1])
    return sum(rows[: mine[0]]), last
