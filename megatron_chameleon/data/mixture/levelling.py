"""Levelling: spreads the room that a block leaves empty over all of its sequences.

A block holds a little less than its sequences have room for. Best fit fills one sequence after the
other to the brim and leaves all of that room to the last ones, so a step of them would have hardly
any tokens. Here the emptiest sequences are given documents of the fullest, and text that flows
rises to one level in all of them, as water does.

A sequence gives away a document only if at most ``LARGEST_ROOM`` of its room is empty afterwards.
If all documents are larger than that, it gives away a small one, as long as the emptier sequence
gains by it.
"""

import bisect
import heapq
from typing import NamedTuple

import numpy as np

LARGEST_ROOM = 1 / 4
"""Share of a sequence that is left empty at most, if the documents allow it."""
_LEAST_GAIN = 1 / 16
"""Share of a sequence by which a move must help if it leaves more than ``LARGEST_ROOM`` empty."""
_SMALL_ROOM = 1 / 128
"""Share of a sequence that is too small to cut a document for it."""


class _Offer(NamedTuple):
    """A document that a sequence can give away; offers are taken in ascending order."""

    room: int
    """Tokens that are empty in the sequence afterwards."""
    sequence: int
    item: int


def level(
    tokens: np.ndarray,
    placed: np.ndarray,
    rooms: np.ndarray,
    text: int,
    seq_length: int,
    ends_run: bool = False,
) -> tuple[np.ndarray, int]:
    """Level the sequences of a block, as far as its documents allow it.

    Args:
        tokens: Length of each item; int64 [items].
        placed: The sequence of each item, -1 for those that may not move; int64 [items]. It is
            changed in place.
        rooms: Tokens that are empty in each sequence; int64 [sequences]. It is changed in place.
        text: Tokens that flow into the rooms, at most as many as are empty.
        seq_length: Tokens that a sequence holds.
        ends_run: Whether to fill all other sequences before the emptiest one, which is then the
            last of the run.

    Returns:
        Tokens of the text that each sequence takes, int64 [sequences], and the number of the last
        sequence, -1 if it may be any.
    """
    last = int(np.argsort(rooms, kind="stable")[-1]) if ends_run else -1
    fills = _fill(rooms, text, seq_length, ends_run)
    if ends_run and rooms[last] - fills[last] == seq_length:
        return level(tokens, placed, rooms, text, seq_length)  # an empty one needs documents too
    too_empty = rooms - fills > int(seq_length * LARGEST_ROOM)
    if too_empty[np.arange(len(rooms)) != last].any():
        level_whole(tokens, placed, rooms, seq_length, last)
        fills = _fill(rooms, text, seq_length, ends_run)
    return fills, last


def _fill(rooms: np.ndarray, text: int, seq_length: int, ends_run: bool) -> np.ndarray:
    return fill_in_turn(rooms, text) if ends_run else level_text(rooms, text, seq_length)


def level_whole(
    tokens: np.ndarray, placed: np.ndarray, rooms: np.ndarray, seq_length: int, spared: int = -1
) -> None:
    """Move documents from full sequences to the emptiest ones.

    Args:
        tokens: Length of each item; int64 [items].
        placed: The sequence of each item, -1 for those that may not move; int64 [items]. It is
            changed in place.
        rooms: Tokens that are empty in each sequence; int64 [sequences]. It is changed in place.
        seq_length: Tokens that a sequence holds.
        spared: A sequence that neither gives nor receives; -1 for none.
    """
    limit = int(seq_length * LARGEST_ROOM)
    numbers = [number for number in range(len(rooms)) if number != spared]
    receivers = [(-int(rooms[number]), number) for number in numbers if rooms[number] > limit]
    if not receivers:
        return
    members = _members(tokens, placed, len(rooms))
    offers = [
        _offer(tokens, members[number], number, int(rooms[number]), limit)
        for number in numbers
        if members[number]
    ]
    heapq.heapify(receivers)
    heapq.heapify(offers)
    while receivers and offers:
        (negative_room, receiver), offer = receivers[0], offers[0]
        if offer.room > max(limit, -negative_room - seq_length * _LEAST_GAIN):
            return
        heapq.heappop(offers)
        length = int(tokens[offer.item])
        if rooms[offer.sequence] + length != offer.room:
            continue  # the sequence has received something since
        placed[offer.item] = receiver
        rooms[offer.sequence] += length
        rooms[receiver] -= length
        left = members[offer.sequence]
        left.remove(offer.item)
        heapq.heappush(offers, _offer(tokens, left, offer.sequence, offer.room, limit))
        if rooms[receiver] > limit:
            heapq.heapreplace(receivers, (-int(rooms[receiver]), receiver))
        else:
            heapq.heappop(receivers)


def _members(tokens: np.ndarray, placed: np.ndarray, sequences: int) -> list[list[int]]:
    """The items of each sequence, from the shortest to the longest."""
    index = np.flatnonzero(placed >= 0)
    index = index[np.lexsort((tokens[index], placed[index]))]
    borders = np.searchsorted(placed[index], np.arange(1, sequences))
    return [part.tolist() for part in np.split(index, borders)]


def _offer(tokens: np.ndarray, members: list[int], sequence: int, room: int, limit: int) -> _Offer:
    """The longest document that leaves no more than ``limit`` empty, or else the shortest one."""
    index = bisect.bisect_right(members, limit - room, key=lambda item: int(tokens[item]))
    item = members[max(0, index - 1)]
    return _Offer(room + int(tokens[item]), sequence, item)


def level_text(rooms: np.ndarray, total: int, seq_length: int) -> np.ndarray:
    """Pour text into the rooms so that the same number of tokens stays empty in all of them.

    Args:
        rooms: Tokens that are empty in each sequence; int64 [sequences].
        total: Tokens of the text, at most those of all rooms.
        seq_length: Tokens that a sequence holds.

    Returns:
        Tokens of text that each sequence takes; int64 [sequences]. A room that is smaller than
        what is left empty in the others takes none.
    """
    fills = _pour(rooms, total)
    large = np.where(fills < seq_length * _SMALL_ROOM, 0, rooms)
    return _pour(large, total) if large.sum() >= total else fills


def _pour(rooms: np.ndarray, total: int) -> np.ndarray:
    """Find the level at which the text fills the rooms, by halving."""
    low, high = 0, int(rooms.max()) + 1  # the rooms above ``low`` hold the text, those above
    while high - low > 1:  # ``high`` do not
        middle = (low + high) // 2
        if np.maximum(rooms - middle, 0).sum() >= total:
            low = middle
        else:
            high = middle
    fills = np.maximum(rooms - low, 0)
    one_less = np.flatnonzero(fills)[: int(fills.sum()) - total]
    fills[one_less] -= 1
    return fills


def fill_in_turn(rooms: np.ndarray, total: int) -> np.ndarray:
    """Pour text into one room after the other, the smallest first: int64 [sequences]."""
    order = np.argsort(rooms, kind="stable")
    before = np.cumsum(rooms[order]) - rooms[order]
    fills = np.empty_like(rooms)
    fills[order] = np.clip(total - before, 0, rooms[order])
    return fills
