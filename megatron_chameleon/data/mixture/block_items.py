"""Which documents, and which parts of them, a block of a mixture holds before it is packed."""

import numpy as np

from megatron_chameleon.data.mixture.packing import PackingItems
from megatron_chameleon.data.mixture.phases import Phase
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts
from megatron_chameleon.errors import DataError


def items_of_block(phase: Phase, block: int, seq_length: int) -> PackingItems:
    """Take the documents of a block from the streams of its sources, evenly merged.

    Args:
        phase: The phase that the block belongs to.
        block: Number of the block within the phase.
        seq_length: Tokens of a sequence.

    Raises:
        DataError: An image is longer than a sequence.
    """
    groups, sources, places, whole = [], [], [], []
    for number, (key, cursor) in enumerate(phase.cursors.items()):
        if key not in phase.rates:
            continue
        parts = cursor.parts(phase.position(key, block), phase.position(key, block + 1))
        flows = ~parts.stays_whole & (not cursor.stream.isolated)
        parts, flows = cut_long_parts(parts, flows, cursor, seq_length)
        tokens = parts.tokens
        groups.append(parts)
        sources.append(np.full(len(tokens), number))
        # The middle of each part, as a share of what its source gives to the block.
        places.append((np.cumsum(tokens) - tokens / 2) / max(1, int(tokens.sum())))
        whole.append(~flows)
    order = np.argsort(np.concatenate(places), kind="stable")
    parts = DocumentParts.join(groups).take(order)
    return PackingItems(parts, np.concatenate(sources)[order], np.concatenate(whole)[order])


def cut_long_parts(
    parts: DocumentParts, flows: np.ndarray, cursor: Cursor, seq_length: int
) -> tuple[DocumentParts, np.ndarray]:
    """Cut the parts that are longer than a sequence and do not flow, within their text.

    Args:
        parts: Parts of one source.
        flows: Which of them may be cut anywhere; bool [parts].
        cursor: The source.
        seq_length: Tokens of a sequence.

    Returns:
        The parts after cutting, and which of them flow.
    """
    long = (parts.tokens > seq_length) & ~flows
    if not long.any():
        return parts, flows
    groups, flags, done = [], [], 0
    for index in np.flatnonzero(long).tolist():
        groups += [parts.take(slice(done, index)), _cut(parts, index, cursor, seq_length)]
        flags += [flows[done:index], np.zeros(len(groups[-1]), dtype=bool)]
        done = index + 1
    groups.append(parts.take(slice(done, None)))
    flags.append(flows[done:])
    return DocumentParts.join(groups), np.concatenate(flags)


def _cut(parts: DocumentParts, index: int, cursor: Cursor, seq_length: int) -> DocumentParts:
    """Cut one part into parts of at most a sequence."""
    rest = parts.take(np.array([index]))
    starts = [int(rest.start[0])]
    stop = int(rest.stop[0])
    while stop - starts[-1] > seq_length:
        count = cursor.stream.last_cut(rest, seq_length)
        if count == 0:
            raise DataError(
                f"{cursor.stream.corpus.prefix}: document {int(rest.document[0])}",
                f"an image at token {starts[-1]} is longer than model.seq_length {seq_length}",
                "Choose a model.seq_length that holds a whole image",
            )
        starts.append(starts[-1] + count)
        rest.start[0] = starts[-1]
    many = parts.take(np.full(len(starts), index))
    many.start[:] = starts
    many.stop[:] = [*starts[1:], stop]
    return many
