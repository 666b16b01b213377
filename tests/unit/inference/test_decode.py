"""Sampling rules, and the cached left-padded batch against plain forward passes."""

from pathlib import Path

import pytest
import torch

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.decode import (
    CachedContext,
    GenerationOptions,
    Guide,
    choose,
    decode,
    penalise_repetition,
)
from megatron_chameleon.inference.modality import Force, TokenClasses
from megatron_chameleon.inference.session import Session

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
"""fp32, sums in another order: observed up to 1.6e-6 on logits up to 4."""


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint)


def draws(logits: list[float], options: GenerationOptions, allowed: list[bool]) -> set[int]:
    """What comes in 300 draws; a probability of 5% is missed with a chance of 2e-7."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor(logits).expand(300, -1).clone()
    return set(choose(rows, torch.tensor(allowed).expand(300, -1), options, generator).tolist())


PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
ALL = [True] * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GenerationOptions(temperature=0), {0}),
        (GenerationOptions(temperature=1, top_p=1.0), {0, 1, 2, 3}),
        (GenerationOptions(temperature=1, top_p=0.79), {0, 1}),
        (GenerationOptions(temperature=1, top_p=0.81), {0, 1, 2}),
        (GenerationOptions(temperature=1, top_p=0.01), {0}),
        (GenerationOptions(temperature=1, top_p=1.0, top_k=3), {0, 1, 2}),
        (GenerationOptions(temperature=0.01, top_p=1.0), {0}),
    ],
)
def test_what_can_be_drawn(options: GenerationOptions, expected: set[int]) -> None:
    assert draws(PROBABILITIES, options, ALL) == expected


def test_what_is_not_allowed_is_never_drawn() -> None:
    options = GenerationOptions(temperature=1, top_p=1.0)
    assert draws(PROBABILITIES, options, [False, True, False, True]) == {1, 3}
    assert draws(PROBABILITIES, GenerationOptions(temperature=0), [False, True, True, True]) == {1}


def test_repetition_makes_seen_tokens_less_likely_at_either_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerationOptions(temperature=-1), "temperature: -1 is not 0 or more"),
        (GenerationOptions(top_p=0), "top_p: 0 is not above 0 and at most 1"),
        (GenerationOptions(max_tokens=0), "max_tokens: 0 is not above 0"),
    ],
)
def test_meaningless_options_are_refused(options: GenerationOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.check()


@torch.inference_mode()
def test_padded_rows_with_a_cache_see_what_they_would_see_alone(session: Session) -> None:
    model = session.model
    sequences = [[0, 40, 50, 60, 70], [0, 9], [0, 30, 31, 32, 33, 34, 35, 36]]
    width = max(map(len, sequences)) - 1
    context = CachedContext(model)
    rows = [[1] * (width - len(s) + 1) + s[:-1] for s in sequences]
    visible = [[False] * (width - len(s) + 1) + [True] * (len(s) - 1) for s in sequences]
    first = context.step(torch.tensor(rows), torch.tensor(visible))
    last_tokens = torch.tensor([s[-1:] for s in sequences])
    second = context.step(last_tokens, torch.ones_like(last_tokens, dtype=torch.bool))
    for row, sequence in enumerate(sequences):
        alone = model.lm_head(model.model(input_ids=torch.tensor([sequence])).last_hidden_state)[0]
        torch.testing.assert_close(first[row], alone[-2], **CLOSE)
        torch.testing.assert_close(second[row], alone[-1], **CLOSE)


@torch.inference_mode()
def test_hidden_columns_take_no_position(session: Session) -> None:
    model = session.model
    context = CachedContext(model)
    context.step(torch.tensor([[0, 40, 50]]), torch.ones(1, 3, dtype=torch.bool))
    context.forget(torch.tensor([True]), keep_columns=1)
    context.step(torch.tensor([[99]]), torch.tensor([[False]]))
    logits = context.step(torch.tensor([[60]]), torch.tensor([[True]]))
    alone = model.lm_head(model.model(input_ids=torch.tensor([[0, 60]])).last_hidden_state)
    torch.testing.assert_close(logits[0], alone[0, -1], **CLOSE)


@torch.inference_mode()
def _greedy_with_guidance(session: Session, prompt: list[int], scale: float) -> list[int]:
    """An image without batch, padding or cache: two full passes a code."""
    model, vocabulary = session.model, session.tokenizer.vocabulary
    codes = torch.tensor(vocabulary.code_token_ids.copy())
    drawn = [vocabulary.begin_image]
    for _ in range(session.codes_per_image):
        with_prompt, without = (
            model.lm_head(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1]
            for ids in (prompt + drawn, [vocabulary.bos, *drawn])
        )
        guided = without + scale * (with_prompt - without)
        drawn.append(int(codes[guided[codes].argmax()]))
    return [*drawn, vocabulary.end_image]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_the_formula(session: Session, scale: float) -> None:
    prompts = [[0, 100, 110, 120], [0, 90], [0, 200, 210]]
    options = GenerationOptions(temperature=0, guidance=scale, force=Force.IMAGE)
    classes = TokenClasses(session.tokenizer.vocabulary)
    generator = torch.Generator()
    answers = decode(session.model, prompts, classes, 16, [50, 50, 50], options, generator)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == _greedy_with_guidance(session, prompt, scale)


def test_guidance_changes_the_image(session: Session) -> None:
    """Else the test above could not fail."""
    one, three = (_greedy_with_guidance(session, [0, 100, 110, 120], s) for s in (1.0, 3.0))
    assert one != three


@torch.inference_mode()
def test_the_pass_without_prompt_sees_the_current_image_alone(session: Session) -> None:
    """Two images with text between them in the first row, text only in the second."""
    model, vocabulary = session.model, session.tokenizer.vocabulary
    begin, end = vocabulary.begin_image, vocabulary.end_image
    first = [60, begin, 7, 8, end, 70, 71, begin, 9]
    in_image = [False, True, True, True, False, False, False, True, True]
    guide = Guide(model, vocabulary.bos, 2, torch.device("cpu"))
    for token_id, inside in zip(first, in_image, strict=True):
        guide.advance(torch.tensor([token_id, 80]), torch.tensor([inside, False]))
    with_prompt = torch.zeros(2, model.config.vocab_size)
    guided = guide.guide(with_prompt, torch.tensor([True, False]), scale=0.0)
    alone = model.lm_head(model.model(input_ids=torch.tensor([[0, begin, 9]])).last_hidden_state)
    torch.testing.assert_close(guided[0], alone[0, -1], **CLOSE)
    assert torch.equal(guided[1], with_prompt[1])
