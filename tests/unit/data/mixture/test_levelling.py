"""Levelling one block: nothing is lost, nothing gets emptier than it must, text rises evenly."""

import numpy as np
import pytest

from megatron_chameleon.data.mixture.levelling import (
    LARGEST_ROOM,
    fill_in_turn,
    level,
    level_text,
    level_whole,
)

SEQ_LENGTH = 100


def rooms_of(tokens, placed, sequences):
    """The room that each sequence has left, counted anew."""
    here = placed >= 0
    filled = np.bincount(placed[here], weights=tokens[here], minlength=sequences)
    return SEQ_LENGTH - filled.astype(np.int64)


def random_block(draw, longest):
    """Sequences filled one after the other to the brim, and empty ones behind them."""
    sequences = int(draw.integers(2, 60))
    tokens = draw.integers(1, longest + 1, 60 * sequences)
    placed, room, number = np.full(len(tokens), -1), SEQ_LENGTH, 0
    last = max(1, sequences - int(draw.integers(0, 1 + sequences // 10)))
    for item, length in enumerate(tokens.tolist()):
        if length > room:
            number, room = number + 1, SEQ_LENGTH
        if number == last:
            break
        placed[item], room = number, room - length
    return tokens[: item + 1], placed[: item + 1], sequences


@pytest.mark.parametrize("longest", [1, 7, 20, 60, 100])
def test_random_blocks_become_no_emptier_than_their_documents_demand(longest):
    limit = int(SEQ_LENGTH * LARGEST_ROOM)
    for seed in range(40):
        draw = np.random.default_rng(seed)
        tokens, placed, sequences = random_block(draw, longest)
        rooms, before = rooms_of(tokens, placed, sequences), placed.copy()
        emptiest, full = rooms.max(), rooms <= limit
        level_whole(tokens, placed, rooms, SEQ_LENGTH)
        np.testing.assert_array_equal(rooms, rooms_of(tokens, placed, sequences))
        np.testing.assert_array_equal(placed >= 0, before >= 0)  # each document is somewhere
        assert rooms.max() <= emptiest and rooms.min() >= 0
        if longest <= 20 and rooms.mean() <= limit - longest:
            assert rooms.max() <= limit
        # No move that helps is left: any giver would become about as empty as the emptiest.
        givers = np.flatnonzero(full & (rooms < SEQ_LENGTH))
        if rooms.max() > limit and len(givers):
            left = [rooms[n] + tokens[placed == n].min() for n in givers.tolist()]
            assert min(left) > rooms.max() - SEQ_LENGTH / 16


def test_large_documents_move_only_if_it_helps():
    tokens = np.array([40, 40, 60, 60])
    placed = np.array([0, 0, 1, 2])
    rooms = rooms_of(tokens, placed, 4)
    level_whole(tokens, placed, rooms, SEQ_LENGTH)
    assert sorted(rooms.tolist()) == [40, 40, 60, 60]
    level_whole(tokens, placed, rooms, SEQ_LENGTH)
    assert sorted(rooms.tolist()) == [40, 40, 60, 60]


def test_what_may_not_move_stays():
    tokens, placed = np.array([50, 50]), np.array([-1, -1])  # cut into the sequences already
    rooms = np.array([0, 100])
    level_whole(tokens, placed, rooms, SEQ_LENGTH)
    assert placed.tolist() == [-1, -1] and rooms.tolist() == [0, 100]


def test_text_leaves_the_same_room_everywhere():
    draw = np.random.default_rng(1)
    for _ in range(200):
        rooms = draw.integers(0, SEQ_LENGTH + 1, int(draw.integers(1, 40)))
        total = int(draw.integers(0, rooms.sum() + 1))
        fills = level_text(rooms, total, 1)  # no room is too small
        assert fills.sum() == total and (fills >= 0).all() and (fills <= rooms).all()
        left = (rooms - fills)[fills > 0]
        if len(left):
            assert left.max() - left.min() <= 1
            assert (rooms[fills == 0] <= left.max() + 1).all()


def test_text_is_not_cut_for_a_few_tokens_if_there_is_other_room():
    seq_length = 1280
    assert level_text(np.array([9, 1280, 1280]), 2550, seq_length).tolist() == [0, 1275, 1275]
    assert level_text(np.array([9, 1280, 1280]), 2569, seq_length).tolist() == [9, 1280, 1280]


def test_filling_in_turn_leaves_the_rest_to_the_emptiest():
    assert fill_in_turn(np.array([100, 20, 100]), 130).tolist() == [100, 20, 10]
    assert fill_in_turn(np.array([100, 20, 100]), 0).tolist() == [0, 0, 0]


def test_the_end_of_a_run_has_one_sequence_for_what_is_left():
    """Three documents of 30 fill a sequence; the eleventh is left to the last one."""
    tokens = np.full(10, 30)
    placed = np.repeat([0, 1, 2, 3], [3, 3, 3, 1])
    rooms = rooms_of(tokens, placed, 4)
    fills, last = level(tokens, placed, rooms, 0, SEQ_LENGTH, ends_run=True)
    assert last == 3 and rooms.tolist() == [10, 10, 10, 70] and fills.tolist() == [0] * 4
    # Elsewhere in the run, the others would give it some of theirs.
    level(tokens, placed, rooms, 0, SEQ_LENGTH)
    assert sorted(rooms.tolist()) == [10, 10, 40, 40]


def test_no_sequence_is_empty_at_the_end_of_a_run():
    tokens, placed = np.array([50, 50]), np.array([0, 0])
    rooms = rooms_of(tokens, placed, 2)
    fills, last = level(tokens, placed, rooms, 0, SEQ_LENGTH, ends_run=True)
    assert rooms.tolist() == [50, 50] and last == -1
    rooms = np.array([10, 100])
    fills, last = level(tokens[:0], placed[:0], rooms, 8, SEQ_LENGTH, ends_run=True)
    assert fills.tolist() == [0, 8] and last == -1
