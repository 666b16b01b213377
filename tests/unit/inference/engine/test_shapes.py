"""The rules of images that have a grid of their own."""

import numpy as np
import pytest
import torch

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.engine.modality import AnswerRules, Force, ModalityState
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE, ImagePlace
from random_model import SHAPED, SHAPED_FORM, ShapedModel

CLASSES = ShapedModel.classes
BEGIN, END, ROW = SHAPED.begin_image, SHAPED.end_image, SHAPED.end_row


def state_of(
    *tokens_left: int, size: str | None = None, force: Force | None = None
) -> ModalityState:
    rules = AnswerRules.of(SHAPED_FORM, True, force, size)
    return ModalityState.begin(CLASSES, SHAPED_FORM, tokens_left, [rules] * len(tokens_left))


def allowed(state: ModalityState, row: int = 0) -> set[int]:
    return set(state.allowed()[row].nonzero().flatten().tolist())


def grids(state: ModalityState) -> set[Grid | None]:
    return {SHAPED.grid_of_token(token) for token in allowed(state)}


def advance(state: ModalityState, *token_ids: int) -> None:
    for token_id in token_ids:
        assert token_id in allowed(state)
        state.advance(torch.tensor([token_id]))


@pytest.mark.parametrize("grid", SHAPED.grids, ids=str)
def test_an_image_has_exactly_the_rows_and_columns_that_it_announces(grid: Grid) -> None:
    state = state_of(80)
    tokens = SHAPED.image_tokens(np.zeros(grid.codes, np.int64), grid).tolist()
    for place, token_id in enumerate([BEGIN, *tokens, END]):
        if token_id in (ROW, END):
            assert allowed(state) == {token_id}
        elif place > 1:
            assert allowed(state) == set(SHAPED.code_token_ids.tolist())
        advance(state, token_id)
    assert not state.in_image_B[0] and BEGIN in allowed(state)


def test_only_grids_that_fit_are_offered_and_an_image_with_none_is_not_begun() -> None:
    lengths = {grid: SHAPED.image_length(grid) for grid in SHAPED.grids}
    assert len(set(lengths.values())) > 3
    for left in range(1, max(lengths.values()) + 3):
        fitting, state = {g for g, length in lengths.items() if length <= left}, state_of(left)
        assert (BEGIN in allowed(state)) == bool(fitting)
        if fitting:
            advance(state, BEGIN)
            assert grids(state) == fitting


@pytest.mark.parametrize("grid", SHAPED.grids, ids=str)
def test_a_size_forces_its_grid_and_is_not_begun_where_that_does_not_fit(grid: Grid) -> None:
    size = f"{grid.columns}:{grid.rows}"
    length = SHAPED.image_length(grid)
    for force in (None, Force.IMAGE):
        state = state_of(length, size=size, force=force)
        advance(state, BEGIN)
        assert grids(state) == {grid}
    assert BEGIN not in allowed(state_of(length - 1, size=size))


def test_rows_of_a_batch_are_independent_and_follow_the_form() -> None:
    """A batch follows the same random walk as its rows alone, and as the form token by token."""
    generator = torch.Generator().manual_seed(3)
    lefts = [7, 11, 19, 25, *[60] * 12]
    sizes = [None, "1:1", "4:1", "1:4"] * 4
    rules = [AnswerRules.of(SHAPED_FORM, True, None, size) for size in sizes]
    batch = ModalityState.begin(CLASSES, SHAPED_FORM, lefts, rules)
    alone = [
        ModalityState.begin(CLASSES, SHAPED_FORM, [left], [rule])
        for left, rule in zip(lefts, rules, strict=True)
    ]
    places, images, walks = [OUTSIDE] * 16, 0, [list[int]() for _ in lefts]
    for _ in range(60):
        masks = batch.allowed()
        weights = masks.float()
        weights[:, BEGIN] *= 9
        tokens = torch.multinomial(weights, 1, generator=generator)[:, 0]
        for row, single in enumerate(alone):
            assert torch.equal(masks[row], single.allowed()[0]), row
            single.advance(tokens[row : row + 1])
            if not batch.finished_B[row]:
                walks[row].append(int(tokens[row]))
                places[row] = SHAPED_FORM.after(places[row], int(tokens[row]))
        batch.advance(tokens)
        kept = zip(batch.image_left_B.tolist(), batch.row_tokens_B.tolist(), strict=True)
        for row, (left, row_tokens) in enumerate(kept):
            if places[row].is_inside and not batch.finished_B[row]:
                assert ImagePlace(left, row_tokens)[:1] == places[row][:1]
                assert left < 1 or left > 1 << 50 or row_tokens == places[row].row_tokens
        images += int((tokens == END).sum())
    assert images > 20
    for walk in walks:  # whatever was begun is whole
        assert walk.count(BEGIN) == walk.count(END)


def test_squares_alone_have_no_kinds_of_grids() -> None:
    with pytest.raises(DataError, match=r"'2:1' is not square"):
        from random_model import FORM

        AnswerRules.of(FORM, True, None, "2:1")
    assert AnswerRules.of(SHAPED_FORM, True, Force.TEXT, "2:1").image_room > 1 << 50
