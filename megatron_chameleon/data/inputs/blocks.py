"""Inputs cut into blocks of whole records, each with the position to go on from behind it.

The process that reads hands blocks to those that encode. Where the blocks are cut changes no byte
of the output. A block of lines holds about a megabyte, and no more than ``BLOCK_IMAGES`` images, so
that a relaunch does not repeat much. Positions count bytes of lines after decompression, samples of
a tar and rows of a parquet file; to go on within a compressed file, what is before is decompressed
and thrown away.

A file that breaks off gives its whole records and then a ``Fault``.
"""

from collections.abc import Iterator, Sequence
from typing import IO

from megatron_chameleon.data.inputs.files import Input, Span
from megatron_chameleon.data.inputs.lines import line_pieces
from megatron_chameleon.data.inputs.parquet import parquet_pieces
from megatron_chameleon.data.inputs.records import BROKEN_FILE, Block, Fault, Position
from megatron_chameleon.data.inputs.tar import tar_pieces
from megatron_chameleon.errors import DataError


def read_blocks(
    inputs: Sequence[Input], spans: Sequence[Span], position: Position | None = None
) -> Iterator[Block]:
    """The blocks of all spans from a position on.

    Raises:
        DataError: When a file cannot be opened, or a disk or network fails.
    """
    position = position or Position()
    before = sum(span.size_bytes for span in spans[: position.span])
    for number, span in enumerate(spans[position.span :], start=position.span):
        item = inputs[span.input]
        here = position if number == position.span else Position(number)
        try:
            with item.open() as file:
                yield from _blocks_of(item, span, file, number, here, before)
        except OSError as error:
            what = f"cannot read on ({' '.join(str(error).split())})"
            raise DataError(item.path, what, "Check the disk or network, then go on") from error
        before += span.size_bytes


def _blocks_of(
    item: Input, span: Span, file: IO[bytes], number: int, here: Position, before: int
) -> Iterator[Block]:
    """The blocks of one span, from ``here`` on."""
    if item.kind == "lines":
        pieces = line_pieces(item, span, file, here)
    elif item.kind == "tar":
        pieces = tar_pieces(item, file, here.record)
    else:
        pieces = parquet_pieces(item, span, file, here.record)
    first_byte = span.start if item.kind == "lines" else 0
    for piece in pieces:
        read_bytes = before + max(piece.read_bytes - first_byte, 0)
        after = Position(number, piece.offset, piece.record_after, read_bytes)
        if isinstance(piece.payload, Fault) and piece.payload.reason == BROKEN_FILE:
            after = Position(number + 1, read_bytes=before + span.size_bytes)
        yield Block(item.path, span.input, piece.record, after, piece.payload)
