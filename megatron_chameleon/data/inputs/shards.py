"""Which parts of the inputs belong to a shard."""

from collections.abc import Sequence

from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.parquet import row_borders


def plan_ranges(inputs: Sequence[InputFile], shard: tuple[int, int] = (0, 1)) -> list[InputRange]:
    """Find what one of several shards reads: a contiguous stretch of about 1/N of all bytes.

    The documents of the shards, one shard after the other, are the documents of all inputs in
    order. Uncompressed lines and parquet are cut within a file; any other file belongs to one shard
    as a whole.

    Args:
        inputs: All input files.
        shard: (I, N), 0 <= I < N.
    """
    total = sum(item.size_bytes for item in inputs)
    low, high = (total * (shard[0] + i) // shard[1] for i in (0, 1))
    is_last = shard[0] == shard[1] - 1
    ranges, begin = [], 0
    for index, item in enumerate(inputs):
        start, stop = max(low - begin, 0), high - begin
        end, size = begin + item.size_bytes, item.size_bytes
        if (low <= begin and end <= high) and (begin < high or is_last):
            ranges.append(InputRange(index, 0, None, size))
        elif begin < high and low < end and size:
            part = _cut(item, index, start, min(stop, size))
            ranges += [part] if part is not None else []
        begin = end
    return ranges


def _cut(item: InputFile, index: int, start: int, stop: int) -> InputRange | None:
    """The part of a file whose records start in the bytes [start, stop); None if there is none."""
    last = None if stop == item.size_bytes else stop
    if item.kind == "lines" and item.compression is None:
        return InputRange(index, start, last, stop - start)
    if item.kind in ("parquet", "arrow"):
        rows = row_borders(item, start, last)
        return None if rows is None else InputRange(index, *rows, stop - start)
    return InputRange(index, 0, None, item.size_bytes) if start == 0 else None
