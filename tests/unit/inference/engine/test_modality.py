"""The state machine, with single rows and with many rows at once."""

import pytest
import torch

from megatron_chameleon.inference.engine.modality import (
    AnswerRules,
    Force,
    ModalityState,
    TokenClasses,
)
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names

CODES_PER_IMAGE = 3
NAMES = ["<s>", "<pad>", "</s>", "<unk>", *control_names(5), "a", "b"]
VOCABULARY = Vocabulary.from_tokens(NAMES)
BEGIN, END, EOS = VOCABULARY.begin_image, VOCABULARY.end_image, VOCABULARY.eos
FORM = ImageForm(VOCABULARY, CODES_PER_IMAGE)
TEXT = {NAMES.index("a"), NAMES.index("b")}
CODES = set(VOCABULARY.code_token_ids.tolist())


def state_of(*tokens_left: int, images: bool = True, force: Force | None = None) -> ModalityState:
    rules = AnswerRules.of(FORM, images, force)
    return ModalityState.begin(
        TokenClasses(VOCABULARY), FORM, tokens_left, [rules] * len(tokens_left)
    )


def allowed(state: ModalityState, row: int = 0) -> set[int]:
    return set(state.allowed()[row].nonzero().flatten().tolist())


def advance(state: ModalityState, *token_ids: int) -> None:
    for row, token_id in enumerate(token_ids):
        assert state.finished_B[row] or token_id in allowed(state, row)
    state.advance(torch.tensor(token_ids))


def test_text_may_continue_end_or_begin_an_image() -> None:
    assert allowed(state_of(50)) == TEXT | {BEGIN, EOS}


def test_an_image_is_exactly_its_codes_and_its_end() -> None:
    state = state_of(50)
    advance(state, BEGIN)
    for code in sorted(CODES)[:CODES_PER_IMAGE]:
        assert allowed(state) == CODES
        advance(state, code)
    assert allowed(state) == {END}
    advance(state, END)
    assert allowed(state) == TEXT | {BEGIN, EOS}
    assert not state.finished_B[0]


def test_an_image_that_does_not_fit_is_not_begun() -> None:
    """Beginning, 3 codes and end are 5 tokens."""
    assert BEGIN in allowed(state_of(5))
    assert BEGIN not in allowed(state_of(4))


def test_a_row_ends_after_its_last_token() -> None:
    state = state_of(2, 3)
    for token_id in sorted(TEXT):
        advance(state, token_id, token_id)
    assert state.finished_B.tolist() == [True, False]
    assert allowed(state, 0) == {VOCABULARY.pad}


def test_end_of_document_finishes_a_row() -> None:
    state = state_of(50, 50)
    advance(state, EOS, min(TEXT))
    assert state.finished_B.tolist() == [True, False]
    before = state.tokens_left_B.clone()
    state.advance(torch.tensor([VOCABULARY.pad, min(TEXT)]))
    assert state.tokens_left_B.tolist() == [before[0], before[1] - 1]


def test_forced_text_has_no_image() -> None:
    assert allowed(state_of(50, force=Force.TEXT)) == TEXT | {EOS}
    assert allowed(state_of(50, images=False)) == TEXT | {EOS}


def test_forced_image_is_one_image_and_nothing_else() -> None:
    state = state_of(50, force=Force.IMAGE)
    assert allowed(state) == {BEGIN}
    advance(state, BEGIN)
    for _ in range(CODES_PER_IMAGE):
        advance(state, min(CODES))
    advance(state, END)
    assert state.finished_B[0]


def test_rows_are_independent() -> None:
    """A batch follows the same random walk as its rows alone, each in its own modality."""
    generator = torch.Generator().manual_seed(1)
    tokens_left = [5, 9, 14, 30, 31, 40, 40, 40, 40, 40]
    batch, alone = state_of(*tokens_left), [state_of(count) for count in tokens_left]
    modalities = set()
    for _ in range(40):
        masks = batch.allowed()
        tokens = torch.multinomial(masks.float(), 1, generator=generator)[:, 0]
        for row, single in enumerate(alone):
            assert torch.equal(masks[row], single.allowed()[0]), row
            single.advance(tokens[row : row + 1])
        batch.advance(tokens)
        modalities.add(tuple(batch.in_image_B.tolist()))
    assert batch.finished_B.all()
    assert len(modalities) > 5  # the walks did mix modalities


@pytest.mark.parametrize("name", ["<s>", "<pad>", "<unk>", "<reserved08706>", "<image>"])
def test_tokens_that_never_come(name: str) -> None:
    state = state_of(50)
    assert NAMES.index(name) not in allowed(state)
    advance(state, BEGIN)
    assert NAMES.index(name) not in allowed(state)
