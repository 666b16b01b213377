"""Reads parquet: lists ``images`` and ``texts`` (OBELICS), or a column ``text`` or ``messages``."""

from collections.abc import Iterator
from typing import IO, Any

from megatron_chameleon.data.inputs.files import InputFile, InputRange
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
            columns = _columns(item, parquet.schema_arrow.names)
            rows = parquet.metadata.num_rows
            stop = rows if part.stop is None else min(part.stop, rows)
            for batch in _batches(parquet, columns, row, stop):
                end = row + batch.num_rows
                yield FileBlock(
                    _to_stream(batch), row, end, end, item.size_bytes * end // max(rows, 1)
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


def _to_stream(batch: Any) -> ParquetRows:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return ParquetRows(sink.getvalue().to_pybytes())


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _columns(item: InputFile, names: list[str]) -> list[str]:
    wanted: tuple[str, ...] = ("images", "texts") if {"images", "texts"} & set(names) else ("text",)
    if "messages" in names and not set(wanted) & set(names):
        wanted = ("messages",)
    missing = [name for name in wanted if name not in names]
    if missing:
        what = f"has no column {' and '.join(missing)} (it has {', '.join(names)[:200]})"
        remedy = "Write the parallel list columns images and texts, or a column text or messages"
        raise DataError(item.path, what, remedy)
    return [name for name in ("id", "source", *wanted) if name in names]


def _batches(parquet: Any, columns: list[str], start: int, stop: int) -> Iterator[Any]:
    """The rows [start, stop), group by group: groups before them are not read."""
    size = INTERLEAVED_ROWS if "images" in columns else TEXT_ROWS
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
