"""Which part of the inputs is a shard's."""

from collections.abc import Sequence

from megatron_chameleon.data.inputs.files import Input, Span
from megatron_chameleon.data.inputs.parquet import row_borders


def plan_spans(inputs: Sequence[Input], shard: tuple[int, int] = (0, 1)) -> list[Span]:
    """What one of several shards reads: a stretch of all bytes in a row, about 1/N of them.

    The shards' documents, one shard after the other, are the documents of all inputs in order.
    Uncompressed lines and parquet are cut within a file, other files belong to one shard whole.

    Args:
        inputs: All of them.
        shard: (I, N), 0 <= I < N.
    """
    total = sum(item.size_bytes for item in inputs)
    low, high = (total * (shard[0] + i) // shard[1] for i in (0, 1))
    is_last = shard[0] == shard[1] - 1
    spans, begin = [], 0
    for number, item in enumerate(inputs):
        start, stop = max(low - begin, 0), high - begin
        end, size = begin + item.size_bytes, item.size_bytes
        if (low <= begin and end <= high) and (begin < high or is_last):
            spans.append(Span(number, 0, None, size))
        elif begin < high and low < end and size:
            span = _cut(item, number, start, min(stop, size))
            spans += [span] if span is not None else []
        begin = end
    return spans


def _cut(item: Input, number: int, start: int, stop: int) -> Span | None:
    """The part of a file that starts in the bytes [start, stop); None for nothing of it."""
    last = None if stop == item.size_bytes else stop
    if item.kind == "lines" and item.compression is None:
        return Span(number, start, last, stop - start)
    if item.kind == "parquet":
        rows = row_borders(item, start, last)
        return None if rows is None else Span(number, *rows, stop - start)
    return Span(number, 0, None, item.size_bytes) if start == 0 else None
