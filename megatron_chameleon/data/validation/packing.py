"""Pack held-out documents into sequences, as training does, but each document once and in order.

Documents with images, conversations and isolated documents stay whole: each goes where it fits
best among the sequences that are open. Text that may flow then fills the remaining room and runs on
from one sequence to the next. The number of sequences is found, not given, so nothing has to be cut
as a last resort. What is longer than a sequence has been cut before (``cut_long_parts``).
"""

import bisect

import numpy as np

from megatron_chameleon.data.mixture.packing import OPEN_SEQUENCES, PackedSequences
from megatron_chameleon.data.mixture.stream import DocumentParts


def pack_in_order(parts: DocumentParts, flows: np.ndarray, seq_length: int) -> PackedSequences:
    """Put every token of the parts into exactly one sequence.

    Args:
        parts: In the order of the file; at most ``seq_length`` tokens each, apart from those that
            flow.
        flows: Which parts may be cut anywhere; bool [parts].
        seq_length: Tokens that a sequence holds.

    Returns:
        As many sequences as are needed; the parts of each are in the order of the file.
    """
    whole, flowing = np.flatnonzero(~flows), np.flatnonzero(flows)
    placed, rooms = _place(parts.tokens[whole], seq_length)
    index, start, stop, sequence = _pour(parts.take(flowing), rooms, seq_length)
    index = np.concatenate([whole, flowing[index]])
    start = np.concatenate([parts.start[whole], start])
    stop = np.concatenate([parts.stop[whole], stop])
    sequence = np.concatenate([placed, sequence])
    order = np.lexsort((start, index, sequence))
    taken = parts.take(index[order])
    taken = DocumentParts(
        taken.epoch, taken.document, start[order], stop[order], taken.length, taken.stays_whole
    )
    sequence = sequence[order]
    count = int(sequence[-1]) + 1 if len(sequence) else 0
    return PackedSequences(taken, np.zeros_like(sequence), sequence, count)


def _place(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, list[int]]:
    """Find the sequence of each part that stays whole, and the room that is left in each.

    Args:
        lengths: Tokens of each part; int64 [parts].
        seq_length: Tokens that a sequence holds.
    """
    placed = np.zeros(len(lengths), dtype=np.int64)
    rooms: list[int] = []
    opened: list[tuple[int, int]] = []  # room and number of the open sequences, ascending
    for item, length in enumerate(lengths.tolist()):
        place = bisect.bisect_left(opened, (length, -1))
        if place == len(opened):
            opened.append((seq_length, len(rooms)))
            rooms.append(seq_length)
        room, number = opened.pop(place)
        placed[item], rooms[number] = number, room - length
        if room > length:
            bisect.insort(opened, (room - length, number))
        if len(opened) > OPEN_SEQUENCES:
            opened.pop(0)  # the fullest
    return placed, rooms


def _pour(
    parts: DocumentParts, rooms: list[int], seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pour the text that flows into the rooms, in order, and then into new sequences.

    Returns:
        Index of the part, start, stop and sequence of each piece; int64 [pieces].
    """
    # In a smaller room, most of a piece's tokens would lack what they depend on.
    free = [room if room >= seq_length // 128 else 0 for room in rooms]
    ends = np.cumsum(parts.tokens)
    total = int(ends[-1]) if len(ends) else 0
    free += [seq_length] * max(0, -(-(total - sum(free)) // seq_length))
    fills = np.cumsum(np.array(free, dtype=np.int64))
    borders = np.union1d(ends, fills[fills < total])
    borders = borders[borders > 0]
    begins = np.append(0, borders[:-1])[: len(borders)]
    which = np.searchsorted(ends, begins, side="right")
    sequence = np.searchsorted(fills, begins, side="right")
    start = parts.start[which] + begins - (ends - parts.tokens)[which]
    return which, start, start + borders - begins, sequence
