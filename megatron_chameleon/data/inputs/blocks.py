"""Cuts the inputs into blocks of whole records; each block knows the position that follows it.

The reading process hands blocks to the processes that encode them. Where the blocks are cut does
not change a byte of the output. A block of lines holds about a megabyte and at most
``BLOCK_IMAGES`` images, so that a relaunch repeats little work. Positions count bytes of lines
after decompression, samples of a tar, and rows of a parquet file. To resume inside a compressed
file, everything before the position is decompressed and thrown away.

A file that breaks off yields its whole records and then a ``Fault``.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import IO

from megatron_chameleon.data.inputs.files import InputFile, InputRange
from megatron_chameleon.data.inputs.lines import line_blocks
from megatron_chameleon.data.inputs.parquet import parquet_blocks
from megatron_chameleon.data.inputs.records import (
    Block,
    Limits,
    Position,
)
from megatron_chameleon.data.inputs.table import table_blocks
from megatron_chameleon.data.inputs.tar import tar_blocks
from megatron_chameleon.errors import DataError


def read_blocks(
    inputs: Sequence[InputFile],
    ranges: Sequence[InputRange],
    position: Position | None = None,
    limits: Limits | None = None,
    columns: Collection[str] = (),
) -> Iterator[Block]:
    """Read the blocks of all ranges, starting at a position.

    Args:
        inputs: All input files.
        ranges: The parts of them to read, in order.
        position: Where to resume; None starts at the first range.
        limits: What a document may have; None for the usual limits.
        columns: Columns of parquet files, in lower case, that are read though they hold neither
            text nor pictures.

    Raises:
        DataError: If a file cannot be opened, or a disk or network fails.
    """
    position = position or Position()
    before = sum(part.size_bytes for part in ranges[: position.range_index])
    for index, part in enumerate(ranges[position.range_index :], start=position.range_index):
        item = inputs[part.input]
        start = position if index == position.range_index else Position(index)
        try:
            with item.open() as file:
                own = limits or Limits()
                yield from _blocks_of_range(item, part, file, start, before, own, columns)
        except OSError as error:
            what = f"reading failed in mid-file ({' '.join(str(error).split())})"
            remedy = "Check the disk or network, then run the same command again"
            raise DataError(item.path, what, remedy) from error
        before += part.size_bytes


def _blocks_of_range(
    item: InputFile,
    part: InputRange,
    file: IO[bytes],
    start: Position,
    before: int,
    limits: Limits,
    columns: Collection[str],
) -> Iterator[Block]:
    """The blocks of one range from ``start`` on; ``before`` counts the bytes of earlier ranges."""
    first_byte = 0
    if item.kind == "tar":
        found = tar_blocks(item, file, start.record, limits.document_bytes)
    elif item.kind in ("parquet", "arrow"):
        found = parquet_blocks(item, part, file, start.record, limits, columns)
    elif item.kind == "table":
        found = table_blocks(item, file, start.record, limits.document_bytes)
    else:
        found = line_blocks(item, part, file, start, limits.document_bytes)
        first_byte = part.start
    for block in found:
        read_bytes = before + max(block.read_bytes - first_byte, 0)
        after = Position(start.range_index, block.offset, block.record_after, read_bytes)
        if block.ends_file:
            after = Position(start.range_index + 1, read_bytes=before + part.size_bytes)
        yield Block(item.path, part.input, block.record, after, block.payload)
