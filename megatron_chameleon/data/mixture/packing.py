"""Packing: puts parts of documents into the sequences of one block. No image is ever cut.

A part that must stay whole goes where it fits best: into that one of the open sequences in which it
leaves the least room. Sequences are opened at the pace of the tokens, so that the order of the
stream is roughly kept. Then text that may flow fills the remaining room, in order, and runs on from
one sequence to the next as in Megatron. What should stay whole but does not fit anywhere is cut at
text as a last resort.

The number of sequences is given and not found, so a sample's block and its place in the block
follow from its index alone. The mixture gives a block a little less than it can hold (see
``phase_planner.py``). The room that remains is padding. It is spread evenly over the sequences
(``levelling.py``), which are then put into an order that a keyed permutation gives, so that no step
has more padding than the others, wherever it lies in the block. In the last block of a run, the
emptiest sequence comes last.

Runs that began before version 2 of the order keep version 1, without levelling and permutation.

Source: Ding et al., "Fewer truncations improve language modeling", 2024 (best fit);
megatron/core/datasets/gpt_dataset.py (flowing text).
"""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.levelling import level
from megatron_chameleon.data.mixture.permutation import Permutation
from megatron_chameleon.data.mixture.stream import DocumentParts

OPEN_SEQUENCES = 128
"""Number of open sequences among which the best fit is sought."""


@dataclass(frozen=True)
class PackingItems:
    """The document parts to pack, in the order of the stream; the arrays are [parts]."""

    parts: DocumentParts
    source: np.ndarray
    """Number of the source of each part, int64."""
    whole: np.ndarray
    """Whether the part must stay whole; otherwise it flows; bool."""


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of one block; the arrays are [parts], sorted by sequence."""

    parts: DocumentParts
    source: np.ndarray
    """Number of the source of each part, int64."""
    sequence: np.ndarray
    """Number of the sequence of each part, int64, ascending."""
    sequences: int
    """Number of sequences."""

    def of(self, sequence: int) -> "PackedSequences":
        """The parts of one sequence."""
        first, stop = np.searchsorted(self.sequence, [sequence, sequence + 1])
        here = slice(int(first), int(stop))
        return PackedSequences(self.parts.take(here), self.source[here], self.sequence[here], 1)

    def behind(self, sequence: int, source: int) -> DocumentParts:
        """The parts of one source in this sequence and all later ones."""
        return self.parts.take((self.sequence >= sequence) & (self.source == source))


@dataclass(frozen=True)
class Even:
    """Version 2 of the order: the sequences of a block are levelled and permuted."""

    key: tuple[int, ...]
    """What the permutation depends on: integers in [0, 2^64)."""
    ends_run: bool
    """Whether all documents of the run end with the block."""


class DoesNotFitError(Exception):
    """The items need more sequences than the block has."""


LastCut = Callable[[int, DocumentParts, int], int]
"""Takes the number of a source, a part and a length; returns the last place within that length at
which the part may be cut."""


def sequences_needed(items: PackingItems, seq_length: int) -> int:
    """How many sequences the items fill if a new one is opened only when it is needed."""
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
    items: PackingItems,
    sequences: int,
    seq_length: int,
    order: np.ndarray,
    last_cut: LastCut,
    even: Even | None = None,
) -> PackedSequences:
    """Put every token of the items into exactly one of the sequences.

    Args:
        items: Parts of at most ``seq_length`` tokens, apart from those that flow.
        sequences: Number of sequences, at least 1.
        seq_length: Tokens that a sequence holds.
        order: A number for each item, by which the parts of a sequence are finally sorted; int64
            [items].
        last_cut: Where an item that should stay whole may be cut, as a last resort.
        even: How the sequences are levelled and permuted; None for version 1 of the order.

    Raises:
        DoesNotFitError: The items do not fit.
    """
    placed, rooms = _place_whole(items, sequences, seq_length)
    if even is None and items.whole.all():  # otherwise text is poured into every sequence
        _fill_empty(items, placed, rooms, seq_length)
    missing = np.flatnonzero(items.whole & (placed < 0)).tolist()
    forced = [_cut_into_rooms(items, i, rooms, last_cut) for i in missing]
    total = int(items.parts.tokens[~items.whole].sum())
    if rooms.sum() < total:
        raise DoesNotFitError
    if even is None:
        fills, places = _proportional_fills(rooms, total, seq_length), np.arange(sequences)
    else:
        fills, last = level(items.parts.tokens, placed, rooms, total, seq_length, even.ends_run)
        places = _permuted(sequences, even.key, last)
    placements = [
        _placements_of_whole(items, placed),
        *itertools.chain.from_iterable(forced),
        _flow(items, fills),
    ]
    index, start, stop, sequence = (
        np.concatenate(arrays) for arrays in zip(*placements, strict=True)
    )
    sequence = places[sequence]
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
"""Where parts of items are put: index of the item, start, stop and sequence, each int64 [parts]."""


def _place_whole(
    items: PackingItems, sequences: int, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put each item that must stay whole where it fits best.

    Returns:
        The sequence of each item, -1 for those that flow or found no room; int64 [items]. And the
        room that is left in each sequence; int64 [sequences].
    """
    tokens = items.parts.tokens
    whole = np.flatnonzero(items.whole)
    reached = np.cumsum(tokens)[whole]
    total = max(1, int(tokens.sum()))
    paces = -(-(reached * sequences) // total)  # how many sequences should be open by then
    placed = np.full(len(tokens), -1, dtype=np.int64)
    rooms = np.full(sequences, seq_length, dtype=np.int64)
    # Among equal rooms the oldest sequence is taken, so that none stays behind. Where text fills
    # all of them, the newest is taken, so that images are spread evenly.
    sign = 1 if items.whole.all() else -1
    # room and signed number of the open sequences, ascending
    open_sequences: list[tuple[int, int]] = []
    opened = 0
    for item, length, pace in zip(
        whole.tolist(), tokens[whole].tolist(), paces.tolist(), strict=True
    ):
        while opened < pace:
            bisect.insort(open_sequences, (seq_length, sign * opened))
            opened += 1
        place = bisect.bisect_left(open_sequences, (length, -sequences))
        if place == len(open_sequences):
            if opened == sequences:
                continue
            open_sequences.append((seq_length, sign * opened))
            opened += 1
        room, number = open_sequences.pop(place)
        placed[item] = abs(number)
        rooms[abs(number)] = room - length
        if room > length:
            bisect.insort(open_sequences, (room - length, number))
        while len(open_sequences) > OPEN_SEQUENCES:  # close the fullest, or the oldest
            del open_sequences[0 if open_sequences[0][0] < seq_length or sign > 0 else -1]
    return placed, rooms


def _fill_empty(
    items: PackingItems, placed: np.ndarray, rooms: np.ndarray, seq_length: int
) -> None:
    """Give each empty sequence the last document of the sequence that has the most documents."""
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
    """Put one item where there is room, whole if possible, and reduce ``rooms`` accordingly."""
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


def _proportional_fills(rooms: np.ndarray, total: int, seq_length: int) -> np.ndarray:
    """Tokens of text that each sequence takes in version 1 of the order: int64 [sequences]."""
    small = rooms < seq_length // 128  # too small to cut a document for it
    if int(rooms[small].sum()) <= int(rooms.sum()) - total:
        rooms = np.where(small, 0, rooms)
    reached = np.cumsum(rooms)
    ends = reached * total // max(1, int(reached[-1]))
    return np.diff(ends, prepend=0)


def _permuted(sequences: int, key: tuple[int, ...], last: int) -> np.ndarray:
    """The place of each sequence in its block: int64 [sequences]; ``last`` keeps the last one."""
    places = np.full(sequences, sequences - 1)
    moved = np.flatnonzero(np.arange(sequences) != last)
    if len(moved):
        places[moved] = Permutation(len(moved), *key)(np.arange(len(moved)))
    return places


def _flow(items: PackingItems, fills: np.ndarray) -> Placements:
    """Pour the text that flows into the sequences, in order.

    Args:
        items: Those that must stay whole are left out.
        fills: Tokens that each sequence takes; together those of the text; int64 [sequences].
    """
    index = np.flatnonzero(~items.whole)
    tokens = items.parts.tokens[index]
    ends, reached = np.cumsum(tokens), np.cumsum(fills)
    borders = np.union1d(ends, reached)
    borders = borders[borders > 0]
    begins = np.append(0, borders)[:-1]
    which = np.searchsorted(ends, begins, side="right")
    sequence = np.searchsorted(reached, begins, side="right")
    start = items.parts.start[index][which] + begins - (ends - tokens)[which]
    return index[which], start, start + borders - begins, sequence
