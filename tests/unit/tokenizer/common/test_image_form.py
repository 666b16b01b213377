"""The form of images in a sequence of tokens, walked token by token."""

import numpy as np
import pytest

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.common.grids import Grid, Shapes
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE, ImageForm, aspect_ratio
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names
from megatron_chameleon.wording import counted

CODES = 7


def vocabulary_of(shapes: Shapes | None) -> Vocabulary:
    return Vocabulary.from_tokens(
        ["<s>", "<pad>", "</s>", "<unk>", *control_names(CODES, shapes), "a"]
    )


SQUARE = ImageForm(vocabulary_of(None), 9)
SHAPED = ImageForm(vocabulary_of(Shapes(24, 4)), 16)


@pytest.mark.parametrize("grid", SHAPED.grids, ids=str)
def test_a_walk_through_an_image_allows_its_tokens_alone(grid: Grid) -> None:
    v = SHAPED.vocabulary
    codes = np.arange(grid.codes) % CODES
    inside = v.image_tokens(codes, grid).tolist()
    place, announced = SHAPED.begun, None
    for number, token_id in enumerate([*inside, v.end_image]):
        allowed = {t for t in range(v.size) if SHAPED.allows(place, t)}
        if number == 0:
            assert allowed == set(v.grid_token_ids.tolist())
        elif token_id in (v.end_row, v.end_image):
            assert allowed == {token_id}
        else:
            assert allowed == set(v.code_token_ids.tolist())
        # as many codes are certain as come until the end of the row
        row = inside[number:].index(v.end_row) if v.end_row in inside[number:] else 0
        assert place.certain_codes == (row if number else 0)
        place = SHAPED.after(place, token_id)
        announced = announced or SHAPED.grid_at(place, token_id)
    assert place == OUTSIDE and announced == grid
    assert SHAPED.after(OUTSIDE, v.begin_image) == SHAPED.begun


def test_a_square_has_neither_grid_nor_ends_of_rows() -> None:
    v, place = SQUARE.vocabulary, SQUARE.begun
    assert SQUARE.grid_at(place, v.begin_image) == (3, 3)
    for missing in range(9, 0, -1):
        assert place.certain_codes == missing and SQUARE.lacks(place) == counted(missing, "code")
        place = SQUARE.after(place, int(v.code_token_ids[0]))
    assert SQUARE.allows(place, v.end_image) and SQUARE.lacks(place) == "its end"
    assert SQUARE.after(place, v.end_image) == OUTSIDE
    assert SQUARE.lengths == (11,)


def test_what_an_image_lacks_is_counted_in_codes() -> None:
    v, grid = SHAPED.vocabulary, Grid(8, 3)
    place, words = SHAPED.begun, [SHAPED.lacks(SHAPED.begun)]
    for token_id in v.image_tokens(np.zeros(24, np.int64), grid):
        place = SHAPED.after(place, int(token_id))
        words.append(SHAPED.lacks(place))
    assert words[:6] == ["its grid", *(f"{left} codes" for left in (24, 23, 22, 21, 21))]
    assert words[-3:] == ["1 code", "the end of its last row", "its end"]


@pytest.mark.parametrize(
    ("size", "ratio"),
    [("3:2", 1.5), ("480x320", 1.5), ("1.91:1", 1.91), (" 16 : 9 ", 16 / 9), ("2X1", 2),
     ("1×2", 0.5)],
)  # fmt: skip
def test_sizes_in_words(size: str, ratio: float) -> None:
    assert float(aspect_ratio(size)) == pytest.approx(ratio)


@pytest.mark.parametrize(
    "size", ["", "3", "3:", ":2", "0:1", "1:0", "0x0", "-3:2", "3:2:1", "1e3:1", "nan:1", "a:b",
             "3/2", "3:2px", "1234567:1", "٣:٢", "3 2", "0.0:1", "wide"],
)  # fmt: skip
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"is not the size of an image"):
        aspect_ratio(size)


def test_a_size_gets_the_nearest_grid() -> None:
    assert SHAPED.grid_of_size("3:2") == SHAPED.vocabulary.shapes.grid_of(3, 2)
    assert SHAPED.grid_of_size("100:1") == max(SHAPED.grids, key=lambda g: g.columns / g.rows)
    assert SHAPED.grid_of_size(None) is None
    assert SHAPED.tokens_needed("1:1") == SHAPED.vocabulary.image_length(Grid(4, 4))
    assert SHAPED.tokens_needed() == SHAPED.lengths[0]


def test_squares_alone_refuse_other_shapes() -> None:
    assert SQUARE.grid_of_size("512x512") is None and SQUARE.tokens_needed("1:1") == 11
    with pytest.raises(DataError, match=r"'3:2' is not square, but all images of this model are"):
        SQUARE.grid_of_size("3:2")
    with pytest.raises(DataError, match=r"the model draws no images"):
        ImageForm(SQUARE.vocabulary, 0).grid_of_size("1:1")
