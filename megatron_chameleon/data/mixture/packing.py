"""Packing: parts of documents into the sequences of one block, no image ever cut.

What must stay whole is put where it fits best: into that sequence, of a window of open ones, that
it leaves the least room in. Sequences are opened at the pace of the tokens, so that the order of
the stream is kept to within the window. Text that may flow then fills the room that is left, in
order, running on from one sequence to the next as in Megatron. If something that should stay whole
does not fit anywhere at last, it is cut at text.

The number of sequences is given, not found: so a sample's block, and its place in it, follow from
its index alone. ``Mixture`` gives a block a little less than it can hold (see there); what is left
over is padding, spread evenly where text flows.

Source: Ding et al., "Fewer truncations improve language modeling", 2024 (best fit);
megatron/core/datasets/gpt_dataset.py (flowing text).
"""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.stream import DocumentParts

OPEN_SEQUENCES = 128
"""Sequences among which the best fit is looked for."""


@dataclass(frozen=True)
class PackingItems:
    """What is to be packed, in the order of the stream."""

    parts: DocumentParts
    source: np.ndarray
    """Number of the source of each part, int64."""
    whole: np.ndarray
    """Whether the part must stay whole, else it flows; bool."""


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of one block; the arrays are [parts], sorted by sequence."""

    parts: DocumentParts
    source: np.ndarray
    sequence: np.ndarray
    """Number of the sequence, int64, ascending."""
    sequences: int

    def of(self, sequence: int) -> "PackedSequences":
        """The parts of one sequence."""
        first, stop = np.searchsorted(self.sequence, [sequence, sequence + 1])
        here = slice(int(first), int(stop))
        return PackedSequences(self.parts.take(here), self.source[here], self.sequence[here], 1)

    def behind(self, sequence: int, source: int) -> DocumentParts:
        """What a source has in this sequence and the later ones."""
        return self.parts.take((self.sequence >= sequence) & (self.source == source))


class DoesNotFitError(Exception):
    """The items need more sequences than there are."""


LastCut = Callable[[int, DocumentParts, int], int]
"""Given a source, a part and a room: the last place up to there where the part may be cut."""


def sequences_needed(items: PackingItems, seq_length: int) -> int:
    """How many sequences the items fill when new ones are opened only as they are needed."""
    opened = 0
    rooms: list[int] = []  # ascending
    for length in items.parts.tokens[items.whole].tolist():
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            opened += 1
            room = seq_length
        else:
            room = rooms.pop(place)
        if room > length:
            bisect.insort(rooms, room - length)
        if len(rooms) > OPEN_SEQUENCES:
            rooms.pop(0)
    return max(opened, -(-int(items.parts.tokens.sum()) // seq_length))


def pack(
    items: PackingItems, sequences: int, seq_length: int, order: np.ndarray, last_cut: LastCut
) -> PackedSequences:
    """Put every token of the items into exactly one of so many sequences.

    Args:
        items: Parts of at most ``seq_length`` tokens, but for those that flow.
        sequences: At least 1.
        seq_length: Tokens that a sequence holds.
        order: Numbers by which the parts of a sequence are sorted at last, by the index of an
            item; [items].
        last_cut: Where an item may be cut that should stay whole; used at need only.

    Raises:
        DoesNotFitError: They do not fit.
    """
    placed, rooms = _place_whole(items, sequences, seq_length)
    if items.whole.all():  # else text is poured into every sequence
        _fill_empty(items, placed, rooms, seq_length)
    missing = np.flatnonzero(items.whole & (placed < 0)).tolist()
    index, start, stop, sequence = _placements_of_whole(items, placed)
    extra = [_cut_into_rooms(items, i, rooms, last_cut) for i in missing]
    flowing = _flow(items, rooms, seq_length)
    placements = [(index, start, stop, sequence), *itertools.chain.from_iterable(extra), flowing]
    index, start, stop, sequence = (
        np.concatenate(arrays) for arrays in zip(*placements, strict=True)
    )
    by_sequence = np.lexsort((start, order[index], sequence))
    index = index[by_sequence]
    whole = items.parts.take(index)
    parts = DocumentParts(
        whole.epoch,
        whole.document,
        start[by_sequence],
        stop[by_sequence],
        whole.length,
        whole.stays_whole,
    )
    return PackedSequences(parts, items.source[index], sequence[by_sequence], sequences)


Placements = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Index of the item, start, stop and sequence of parts of items, each int64 [parts]."""


def _place_whole(
    items: PackingItems, sequences: int, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sequence of each whole item, -1 where none had room, and the room left in each."""
    tokens = items.parts.tokens
    whole = np.flatnonzero(items.whole)
    reached = np.cumsum(tokens)[whole]
    total = max(1, int(tokens.sum()))
    paces = -(-(reached * sequences) // total)  # sequences that should be open by then
    placed = np.full(len(tokens), -1, dtype=np.int64)
    rooms = np.full(sequences, seq_length, dtype=np.int64)
    # Of equal rooms, the oldest sequence's, so that none stays behind; where text fills them all,
    # the newest's, so that images are spread evenly
    sign = 1 if items.whole.all() else -1
    window: list[tuple[int, int]] = []  # room and signed number of the open sequences, ascending
    opened = 0
    for item, length, pace in zip(
        whole.tolist(), tokens[whole].tolist(), paces.tolist(), strict=True
    ):
        while opened < pace:
            bisect.insort(window, (seq_length, sign * opened))
            opened += 1
        place = bisect.bisect_left(window, (length, -sequences))
        if place == len(window):
            if opened == sequences:
                continue
            window.append((seq_length, sign * opened))
            opened += 1
        room, number = window.pop(place)
        placed[item] = abs(number)
        rooms[abs(number)] = room - length
        if room > length:
            bisect.insort(window, (room - length, number))
        while len(window) > OPEN_SEQUENCES:  # the fullest is closed, or else the oldest
            del window[0 if window[0][0] < seq_length or sign > 0 else -1]
    return placed, rooms


def _fill_empty(
    items: PackingItems, placed: np.ndarray, rooms: np.ndarray, seq_length: int
) -> None:
    """Leave no sequence empty that can get a document of another one: its last one."""
    for number in np.flatnonzero(rooms == seq_length).tolist():
        counts = np.bincount(placed[placed >= 0], minlength=len(rooms))
        giver = int(counts.argmax())
        if counts[giver] < 2:
            return
        item = int(np.flatnonzero(placed == giver)[-1])
        tokens = int(items.parts.stop[item] - items.parts.start[item])
        placed[item] = number
        rooms[giver] += tokens
        rooms[number] -= tokens


def _placements_of_whole(items: PackingItems, placed: np.ndarray) -> Placements:
    index = np.flatnonzero(placed >= 0)
    return index, items.parts.start[index], items.parts.stop[index], placed[index]


def _cut_into_rooms(
    items: PackingItems, item: int, rooms: np.ndarray, last_cut: LastCut
) -> list[Placements]:
    """Put one item where there is room, whole if it can be; takes it from ``rooms``."""
    part = items.parts.take(np.array([item]))  # a copy
    source = int(items.source[item])
    placements: list[Placements] = []
    start, stop = int(part.start[0]), int(part.stop[0])
    while start < stop:
        fitting = np.flatnonzero(rooms >= stop - start)
        number = int(fitting[rooms[fitting].argmin()]) if len(fitting) else int(rooms.argmax())
        count = min(stop - start, int(rooms[number]))
        if not len(fitting):
            count = last_cut(source, part, count)
        if count == 0:
            raise DoesNotFitError
        rooms[number] -= count
        columns = np.array([[item], [start], [start + count], [number]])
        placements.append((columns[0], columns[1], columns[2], columns[3]))
        start += count
        part.start[0] = start
    return placements


def _flow(items: PackingItems, rooms: np.ndarray, seq_length: int) -> Placements:
    """Pour the flowing text into the rooms, in order."""
    index = np.flatnonzero(~items.whole)
    tokens = items.parts.tokens[index]
    ends = np.cumsum(tokens)
    total = int(ends[-1]) if len(ends) else 0
    spare = int(rooms.sum()) - total
    if spare < 0:
        raise DoesNotFitError
    if total == 0:
        none = np.zeros(0, dtype=np.int64)
        return none, none, none, none
    small = rooms < seq_length // 128  # not worth cutting a document for
    if int(rooms[small].sum()) <= spare:
        rooms = np.where(small, 0, rooms)
    reached = np.cumsum(rooms)
    # the padding is spread evenly: no sequence is left empty
    fills = reached * total // int(reached[-1])
    borders = np.union1d(ends, fills)
    borders = borders[borders > 0]
    begins = np.append(0, borders[:-1])
    which = np.searchsorted(ends, begins, side="right")
    sequence = np.searchsorted(fills, begins, side="right")
    start = items.parts.start[index][which] + begins - (ends - tokens)[which]
    return index[which], start, start + borders - begins, sequence
