"""Grids of pictures, and the tokens of a picture in them."""

import itertools
import random
import re

import numpy as np
import pytest

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.common.grids import (
    END_ROW,
    MOST_BUDGET,
    Grid,
    Shapes,
    grid_of_name,
)
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names

CODES = 7


def vocabulary(budget: int | None = 6, largest_ratio: float = 4) -> Vocabulary:
    shapes = None if budget is None else Shapes(budget, largest_ratio)
    names = ["<s>", "<pad>", "</s>", "<unk>", *control_names(CODES, shapes), "a", "b"]
    return Vocabulary.from_tokens(names)


def test_the_grids_of_a_small_budget() -> None:
    """Each is full: no row or no column fits beside it. The square is there although 6 codes hold
    2 x 3."""
    grids = Shapes(codes=6).grids
    assert grids == ((4, 1), (3, 2), (2, 2), (2, 3), (1, 4))
    assert Shapes(codes=16, largest_ratio=1).grids == ((4, 4),)
    assert Shapes(codes=6, largest_ratio=1).grids == ((2, 2),)


@pytest.mark.parametrize("largest_ratio", [1, 1.5, 2, 4, 7.3])
def test_every_budget_gives_grids_of_the_promised_kind(largest_ratio: float) -> None:
    for codes in [*range(8, 70), 256, 1024, 4096]:
        shapes = Shapes(codes, largest_ratio)
        grids = set(shapes.grids)
        assert len(grids) == len(shapes.grids)
        assert all(grid.codes <= codes for grid in grids)
        assert all(grid.elongation <= largest_ratio for grid in grids)
        assert {Grid(grid.columns, grid.rows) for grid in grids} == grids
        full = {
            grid
            for grid in grids
            if (grid.rows + 1) * grid.columns > codes or grid.rows * (grid.columns + 1) > codes
        }
        longest = max(grid.elongation for grid in grids)
        assert all(g == shapes.square or g.elongation == longest for g in grids - full)
        assert longest == largest_ratio or largest_ratio % 1
        assert shapes.square.rows == shapes.square.columns
        assert Shapes.of(shapes.grids[::-1]) == shapes
        ratios = [grid.columns / grid.rows for grid in shapes.grids]
        assert ratios == sorted(ratios)


def test_a_small_budget_reaches_the_ratio_too() -> None:
    """Of 25 codes 2 x 12 is too long and 3 x 8 too short, so 2 x 8 is added."""
    shapes = Shapes(25)
    assert shapes.grids[-1] == (2, 8) and shapes.grids[0] == (8, 2)
    assert Shapes(8).grids == ((4, 1), (4, 2), (3, 2), (2, 2), (2, 3), (2, 4), (1, 4))


def test_only_pictures_longer_than_all_grids_are_beyond() -> None:
    shapes = Shapes(codes=1024)
    sizes = [(1000, 1000), (4000, 1000), (4400, 1000), (4500, 1000), (1000, 4400), (1000, 4500)]
    assert [shapes.is_beyond(*size) for size in sizes] == [False] * 3 + [True, False, True]


def test_a_picture_gets_the_nearest_grid_and_a_turned_one_the_turned_grid() -> None:
    shapes = Shapes(codes=1024)
    assert shapes.grid_of(500, 500) == (32, 32)
    assert shapes.grid_of(1600, 400) == (16, 64)
    assert shapes.grid_of(400, 1600) == (64, 16)
    assert shapes.grid_of(30000, 1) == (16, 64), "the widest for what is wider than all"
    assert shapes.grid_of(1, 1) == (32, 32)
    draw = random.Random(1)
    for _ in range(300):
        width, height = draw.randint(1, 5000), draw.randint(1, 5000)
        rows, columns = shapes.grid_of(width, height)
        assert shapes.grid_of(height, width) == (columns, rows)
        ratio = min(max(width / height, 1 / 4), 4)
        assert 0.96 < columns / rows / ratio < 1.04, (width, height)


@pytest.mark.parametrize(
    ("codes", "largest_ratio", "message"),
    [
        (3, 4.0, "a budget of 3 codes is too small for a picture of 4:1, which takes at least 4"),
        (4, 4.5, "which takes at least 5. Use --image-grids 5 or more, or a smaller"),
        (0, 1.0, "is too small for a picture of 1:1"),
        (MOST_BUDGET + 1, 4.0, "is above 65536. Use --image-grids 65536 or less"),
        (64, 0.5, "--largest-ratio: 0.5 is outside [1, 64]"),
        (64, float("nan"), "--largest-ratio: nan is outside [1, 64]"),
    ],
)
def test_bounds_that_cannot_be_are_refused(codes: int, largest_ratio: float, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Shapes(codes, largest_ratio)


def test_names_spell_grids_and_nothing_else_does() -> None:
    assert all(grid_of_name(grid.name) == grid for grid in Shapes(1024).grids)
    for name in ("<grid_04x4>", "<grid_4x0>", "<grid_4x>", "grid_4x4", "<grid_4x4> ", "<grid_4X4>"):
        assert grid_of_name(name) is None


def test_a_vocabulary_finds_its_grids_by_name_behind_the_sentinels() -> None:
    names = vocabulary()
    assert names.grids == Shapes(6).grids
    assert names.grid_token_ids.tolist() == list(range(4 + CODES + 4, 4 + CODES + 4 + 5))
    assert names.tokens[names.end_row or 0] == END_ROW
    assert names.end_row == names.grid_token_ids[-1] + 1
    assert [names.grid_of_token(i) for i in (int(names.grid_token_ids[1]), 0)] == [(3, 2), None]
    squares = vocabulary(None)
    assert (squares.grids, squares.end_row, squares.shapes) == ((), None, None)
    assert len(squares.grid_token_ids) == len(squares.tokens_beside_codes) == 0


def test_the_tokens_of_a_picture() -> None:
    shaped = vocabulary()
    tokens = [shaped.tokens[i] for i in shaped.image_tokens(np.arange(6), Grid(2, 3))]
    rows = [
        "IMGIMGAZ",
        "IMGIMGBZ",
        "IMGIMGCZ",
        END_ROW,
        "IMGIMGDZ",
        "IMGIMGEZ",
        "IMGIMGFZ",
        END_ROW,
    ]
    assert tokens == ["<grid_2x3>", *rows]
    assert shaped.image_length(Grid(2, 3)) == 2 + len(tokens)


@pytest.mark.parametrize("budget", [None, 6, 12])
def test_a_picture_comes_back_from_its_tokens(budget: int | None) -> None:
    names = vocabulary(budget)
    draw = np.random.default_rng(1)
    for grid in names.grids or (Grid(1, 1), Grid(2, 2), Grid(3, 3)):
        codes = draw.integers(0, CODES, grid.codes)
        token_ids = names.image_tokens(codes, grid)
        assert len(token_ids) + 2 == names.image_length(grid)
        found, back = names.read_image(token_ids.astype(np.uint16))
        assert found == grid and isinstance(found, Grid)
        assert back.tolist() == codes.tolist()


def test_every_damage_of_a_picture_is_refused() -> None:
    """Each token replaced by each other one, left out, doubled, and swapped with the next: what is
    still read must be another whole picture."""
    names = vocabulary()
    refused = 0
    for grid in names.grids:
        sound = names.image_tokens(np.arange(grid.codes) % CODES, grid).tolist()
        damaged = [sound[:cut] for cut in range(len(sound))]
        damaged += [[*sound, extra] for extra in range(names.size)]
        for at in range(len(sound)):
            damaged += [[*sound[:at], *sound[at + 1 :]], [*sound[:at], sound[at], *sound[at:]]]
            damaged += [[*sound[:at], *sound[at : at + 2][::-1], *sound[at + 2 :]]]
            damaged += [
                [*sound[:at], other, *sound[at + 1 :]] for other in range(-1, names.size + 1)
            ]
        for tokens in damaged:
            try:
                read, codes = names.read_image(np.array(tokens, dtype=np.int64))
            except DataError as error:
                assert error.what and error.remedy
                refused += 1
            else:
                assert names.image_tokens(codes, read).tolist() == tokens
    assert refused > 300


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "a picture has no tokens"),
        ([5, 5], "a picture begins with the token 5, not a grid"),
        (["<grid_2x2>", 5, 5, END_ROW, 5, 5], "has 5 tokens after its grid, not 6"),
        (["<grid_2x2>", 5, END_ROW, 5, 5, 5, END_ROW], "row 1 of a picture of 2 x 2 codes"),
        (["<grid_2x2>", 5, 5, END_ROW, 5, 0, END_ROW], "1 of 4 ids are not image codes"),
    ],
)
def test_damage_is_named(tokens: list[int | str], message: str) -> None:
    names = vocabulary()
    ids = [names.tokens.index(item) if isinstance(item, str) else item for item in tokens]
    with pytest.raises(DataError, match=re.escape(message)):
        names.read_image(np.array(ids, dtype=np.int64))


@pytest.mark.parametrize(
    ("budget", "codes", "grid", "message"),
    [
        (6, 5, (2, 3), "5 codes for a grid of 2 x 3, which has 6"),
        (6, 5, (1, 5), "a picture of 1 x 5 codes has none of the 5 grids of the vocabulary"),
        (None, 6, (2, 3), "it has no grids, so all pictures are squares"),
    ],
)
def test_a_grid_that_cannot_be_laid_out_is_refused(
    budget: int | None, codes: int, grid: tuple[int, int], message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        vocabulary(budget).image_tokens(np.zeros(codes, dtype=int), Grid(*grid))


@pytest.mark.parametrize("count", [0, 2, 3, 15])
def test_codes_without_a_grid_must_fill_a_square(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} codes do not fill a square grid"):
        vocabulary(None).read_image(np.full(count, 5))


def test_half_a_set_of_grid_names_is_refused() -> None:
    names = list(vocabulary().tokens)
    without_end = [name for name in names if name != END_ROW]
    without_grids = [name for name in names if not name.startswith("<grid_")]
    with pytest.raises(DataError, match="has 5 grids, but no token such as <end_row>"):
        Vocabulary.from_tokens(without_end)
    with pytest.raises(DataError, match="has <end_row>, but no token such as <grid_4x4>"):
        Vocabulary.from_tokens(without_grids)


def test_all_pictures_of_one_budget_are_told_apart_by_their_tokens() -> None:
    names = vocabulary(12)
    spelled = [tuple(names.image_tokens(np.zeros(g.codes, dtype=int), g)) for g in names.grids]
    assert all(a != b for a, b in itertools.combinations(spelled, 2))
