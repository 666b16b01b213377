"""Reads the rows of parquet files: all columns that could hold text or pictures."""

from collections.abc import Iterator
from typing import IO, Any

from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.form_keys import FORM_KEYS, PICTURE_KEY
from megatron_chameleon.data.inputs.records import BROKEN_FILE, Fault, FileBlock, ParquetRows
from megatron_chameleon.errors import DataError

INTERLEAVED_ROWS = 16
TEXT_ROWS = 256


def parquet_blocks(
    item: InputFile, part: InputRange, file: IO[bytes], done: int
) -> Iterator[FileBlock]:
    """Record batches of a range's rows.

    Args:
        item: The file.
        part: Which rows of it to read.
        file: The open file.
        done: Rows of the file to skip, because an earlier run has read them.
    """
    import pyarrow

    row = max(done, part.start)
    try:
        with _open(file) as parquet:
            columns, unread = _columns(item, parquet.schema_arrow)
            rows = parquet.metadata.num_rows
            stop = rows if part.stop is None else min(part.stop, rows)
            for batch in _batches(parquet, columns, row, stop):
                end = row + batch.num_rows
                yield FileBlock(
                    _to_stream(batch, unread), row, end, end, item.size_bytes * end // max(rows, 1)
                )
                row = end
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        yield _fault(
            item,
            f"the file is damaged after row {row}, the rest of it is lost ({_cause(error)})",
            row,
        )
    except DataError as error:
        yield _fault(item, error.what, row, error.remedy)


def _open(file: IO[bytes]) -> Any:
    import pyarrow.parquet

    # pages are checked and decoded one by one; a whole column might not fit in memory
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)


def _fault(
    item: InputFile, what: str, row: int, remedy: str = "Copy or write the file again"
) -> FileBlock:
    fault = Fault(DataError(item.path, what, remedy), BROKEN_FILE)
    return FileBlock(fault, row, row, row, item.size_bytes)


def _to_stream(batch: Any, unread: list[str]) -> ParquetRows:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return ParquetRows(sink.getvalue().to_pybytes(), tuple(unread))


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _columns(item: InputFile, schema: Any) -> tuple[list[str], list[str]]:
    """The columns to read, and those that can hold neither text nor a picture."""
    names: list[str] = schema.names
    if not set(FORM_KEYS) & set(names):
        what = f"has no column {', '.join(FORM_KEYS)} (it has {', '.join(names)[:200]})"
        remedy = "Write a column text or messages, or the parallel list columns images and texts"
        raise DataError(item.path, what, remedy)
    named = {"id", "source", *FORM_KEYS, *filter(PICTURE_KEY.fullmatch, names)}
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


def _batches(parquet: Any, columns: list[str], start: int, stop: int) -> Iterator[Any]:
    """The rows [start, stop), group by group: groups before them are not read."""
    fields = [parquet.schema_arrow.field(name) for name in columns]
    has_pictures = "images" in columns or any(_holds_bytes(field.type) for field in fields)
    size = INTERLEAVED_ROWS if has_pictures else TEXT_ROWS
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            at = 0
            for batch in parquet.iter_batches(size, row_groups=[group], columns=columns):
                begin, end = max(low - at, 0), min(high - at, batch.num_rows)
                if begin < end:
                    yield batch.slice(begin, end - begin)
                at += batch.num_rows
        first += count


def row_borders(item: InputFile, start: int, stop: int | None) -> tuple[int, int | None] | None:
    """The rows of the row groups that begin in the bytes [start, stop) of a file.

    Row groups are assumed to be equally large. A file that cannot be opened belongs to the shard
    that has its first byte.

    Returns:
        The first row and the row after the last one (None: the end of the file); None if no row
        group begins there.
    """
    import pyarrow

    try:
        with item.open() as file, _open(file) as parquet:
            metadata = parquet.metadata
            groups = metadata.num_row_groups
            rows = [metadata.row_group(group).num_rows for group in range(groups)]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        return (0, None) if start == 0 else None
    if not groups:
        return (0, None) if start == 0 else None
    begins = [item.size_bytes * group // groups for group in range(groups)]
    end = item.size_bytes if stop is None else stop
    mine = [group for group in range(groups) if start <= begins[group] < end]
    if not mine:
        return None
    last = None if mine[-1] == groups - 1 else sum(rows[: mine[-1] + 1])
    return sum(rows[: mine[0]]), last
