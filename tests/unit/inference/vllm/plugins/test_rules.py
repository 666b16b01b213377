"""The rules in both of vLLM's runners: what they leave of random logits is what the decoder draws.

Stand-ins of vLLM's batch are driven here, because vLLM is not installed with the tests.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_chameleon.inference.engine.guidance import Guidance
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.engine.row_settings import RowSettings
from megatron_chameleon.inference.engine.sampling import draw, penalise_repetition, uniforms
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from megatron_chameleon.inference.vllm.plugins.rules import Rules
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from random_model import SHAPED, SHAPED_FORM, ShapedModel

CODES, CONTEXT, PLACES = 4, 40, 8


class Direction(Enum):
    """As vLLM's ``MoveDirectionality``."""

    UNIDIRECTIONAL = auto()
    SWAP = auto()


class Update(SimpleNamespace):
    """As vLLM's ``BatchUpdate``."""

    def __init__(self, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        super().__init__(removed=removed, added=added, moved=moved)


@pytest.fixture(scope="module")
def classes(tiny_tokenizer: Any) -> TokenClasses:
    return TokenClasses(Vocabulary.load(tiny_tokenizer))


def params(request: RowRequest, max_tokens: int) -> Any:
    """As vLLM's ``SamplingParams``."""
    return SimpleNamespace(extra_args=request.extra_args(), max_tokens=max_tokens)


class Batch:
    """A batch of vLLM, in which both runners see the same rows; the host knows all tokens."""

    def __init__(self, classes: TokenClasses, form: ImageForm | None = None) -> None:
        form = form or ImageForm(classes.form.vocabulary, CODES)
        self.v1, self.v2 = (Rules(classes, form, CONTEXT, PLACES) for _ in range(2))
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        self.read: dict[int, int] = {}
        """How much of a prompt V2 has read, if not all of it."""
        self.tokens = torch.zeros(PLACES, CONTEXT, dtype=torch.int32)
        self.slots = random.Random(1).sample(range(PLACES), PLACES)

    def add(self, request: RowRequest, prompt: list[int], max_tokens: int) -> int:
        row, wish = len(self.prompts), params(request, max_tokens)
        self.prompts.append(prompt)
        self.answers.append([])
        slot = self.slots[row]
        self.tokens[slot, : len(prompt)] = torch.tensor(prompt)
        self.v2.put(slot, self.v2.row(wish, len(prompt)))
        self.v1.update_rows(Update(added=[(row, wish, prompt, self.answers[row])]))
        return row

    def step(self, logits_RV: Tensor) -> list[int]:
        """The tokens of all rows, drawn by V1 and by V2 in another order of rows."""
        by_v1 = self._only(self.v1.apply_v1(logits_RV.clone()))
        order = list(range(len(self.prompts)))
        random.Random(len(self.answers[0])).shuffle(order)
        slots = np.array([self.slots[row] for row in order])
        lengths = np.array(
            [self.read.get(r, len(self.prompts[r]) + len(self.answers[r])) for r in order]
        )
        context = SimpleNamespace(
            idx_mapping_np=slots,
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            pos=torch.tensor(lengths - 1),
            seq_lens_upper_bound_np=lengths,
        )
        states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=self.tokens))
        by_v2 = self._only(self.v2.apply_v2(logits_RV[order].clone(), context, states))
        due = [place for place, row in enumerate(order) if row not in self.read]
        assert [by_v2[place] for place in due] == [by_v1[order[place]] for place in due]
        return [by_v2[order.index(row)] for row in range(len(order))]

    def take(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            self.tokens[self.slots[row], len(self.prompts[row]) + len(self.answers[row])] = token
            self.answers[row].append(token)

    @staticmethod
    def _only(logits_RV: Tensor) -> list[int]:
        """The one token that is left in each row."""
        assert ((logits_RV == 0).sum(1) == 1).all()
        assert ((logits_RV == -torch.inf).sum(1) == logits_RV.shape[1] - 1).all()
        return logits_RV.argmax(1).tolist()


def expected(
    classes: TokenClasses, options: GenerationOptions, prompt: list[int], answer: list[int],
    room: int, logits_V: Tensor, in_image: int,
) -> int:  # fmt: skip
    """The next token by the words of the rules, one row at a time, without the tables."""
    allowed_V = torch.zeros_like(classes.text_V)
    if in_image > 0:
        allowed_V |= classes.code_V
    elif in_image == 0:
        allowed_V[classes.end_image] = True
    elif options.force is Force.IMAGE:
        allowed_V[classes.begin_image] = True
    else:
        allowed_V |= classes.text_V
        allowed_V[classes.eos] = True
        fits = room - len(answer) >= CODES + 2
        allowed_V[classes.begin_image] = options.images and options.force is None and fits
    seen_V = torch.zeros_like(classes.text_V)
    seen_V[prompt + answer] = True
    logits_1V = logits_V.clone()[None]
    logits_1V = penalise_repetition(
        logits_1V, (seen_V & classes.text_V)[None], options.repetition_penalty
    )
    logits_1V[0, ~allowed_V] = -torch.inf
    number_1 = uniforms(torch.tensor([options.seed]), torch.tensor([len(answer)]))
    return int(draw(logits_1V, RowSettings.of([options]), number_1))


def steps(batch: Batch, classes: TokenClasses, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        logits_RV = 3 * torch.randn(len(batch.prompts), len(classes.text_V), generator=generator)
        logits_RV[:, classes.begin_image] += 8  # so that images come
        yield logits_RV


OPTIONS = [
    GenerationOptions(temperature=0, repetition_penalty=1.0),
    GenerationOptions(temperature=0.9, top_p=0.8, seed=5),
    GenerationOptions(temperature=2.0, top_p=1.0, repetition_penalty=3.0, seed=9),
    GenerationOptions(top_k=3, images=False),
    GenerationOptions(force=Force.IMAGE, seed=-3),
    GenerationOptions(force=Force.TEXT, repetition_penalty=0.5),
]


def test_rows_draw_what_they_would_draw_alone(classes: TokenClasses) -> None:
    batch, rooms = Batch(classes), [30, 29, 11, 30, CODES + 2, 30]
    begin, end = classes.begin_image, classes.end_image
    code, text = int(classes.code_token_ids[0]), int(classes.text_V.nonzero()[0])
    prompts = [[classes.bos, text]] * 3 + [[classes.bos, begin, *[code] * CODES, end]] * 3
    for options, prompt, room in zip(OPTIONS, prompts, rooms, strict=True):
        batch.add(RowRequest(options), list(prompt), room)
    left, images = [-1] * len(OPTIONS), 0
    for logits_RV in steps(batch, classes, CODES + 2):
        wanted = [
            expected(classes, options, prompt, answer, room, logits_V, inside)
            for options, prompt, answer, room, logits_V, inside in zip(
                OPTIONS, batch.prompts, batch.answers, rooms, logits_RV, left, strict=True
            )
        ]
        assert batch.step(logits_RV) == wanted
        batch.take(wanted)
        left = [CODES if t == begin else n - (n >= 0) for t, n in zip(wanted, left, strict=True)]
        images += wanted.count(end)
    assert images >= 2


def test_an_answer_in_parts_is_the_answer_in_one(classes: TokenClasses) -> None:
    options = GenerationOptions(temperature=1.5, top_p=1.0, seed=4)
    whole, parts = Batch(classes), Batch(classes)
    whole.add(RowRequest(options), [classes.bos], 30)
    logits = list(steps(whole, classes, 12))
    for each in logits:
        whole.take(whole.step(each))
    answer = whole.answers[0]
    parts.add(RowRequest(options, drawn=5), [classes.bos, *answer[:5]], 25)
    for each in logits[5:]:
        parts.take(parts.step(each))
    assert parts.answers[0] == answer[5:]


@pytest.mark.parametrize("image_scale", [None, 1.2, 1.0])
def test_passes_in_one_step_get_the_mixed_code(
    classes: TokenClasses, image_scale: float | None
) -> None:
    options = GenerationOptions(guidance=3.0, guidance_image=image_scale, temperature=0.8, seed=2)
    guidance, batch = Guidance.of(options), Batch(classes)
    batch.add(RowRequest(OPTIONS[1]), [classes.bos], 30)
    for part in reversed(range(len(guidance.passes))):
        start = [classes.bos] * (1 + part) + [classes.begin_image]
        batch.add(RowRequest(options, 1, "g", part), start, CODES + 1)
    for number, logits_RV in enumerate(steps(batch, classes, CODES + 1)):
        tokens = batch.step(logits_RV)
        mixed_1V = guidance.mix(logits_RV[1:].flip(0))
        mixed_1V[:, ~classes.code_V] = -torch.inf
        uniform_1 = uniforms(torch.tensor([2]), torch.tensor([1 + number]))
        wanted = int(draw(mixed_1V, RowSettings.of([options]), uniform_1))
        wanted = classes.end_image if number == CODES else wanted
        assert tokens[1:] == [wanted] * len(guidance.passes)
        batch.take(tokens)


def guided_pair(classes: TokenClasses, second: RowRequest | None, shift: int = 0) -> Batch:
    options = GenerationOptions(guidance=2.0)
    batch = Batch(classes)
    batch.add(RowRequest(options, 1, "g", 0), [classes.bos, classes.begin_image], CODES + 1)
    if second is not None:
        code = int(classes.code_token_ids[0])
        batch.add(second, [classes.bos, classes.begin_image, *[code] * shift], CODES + 1)
    return batch


def test_passes_that_do_not_stand_together_end(classes: TokenClasses) -> None:
    options, pad = GenerationOptions(guidance=2.0), classes.pad
    late = RowRequest(options, 2, "g", 1)
    other = RowRequest(options, 1, "h", 1)
    logits_RV = torch.zeros(2, len(classes.text_V))
    assert guided_pair(classes, None).step(logits_RV[:1]) == [pad]
    assert guided_pair(classes, late, shift=1).step(logits_RV) == [pad, pad]
    assert guided_pair(classes, other).step(logits_RV) == [pad, pad]


def test_v2_waits_for_a_pass_whose_prompt_is_not_read_yet(classes: TokenClasses) -> None:
    batch = guided_pair(classes, RowRequest(GenerationOptions(guidance=2.0), 1, "g", 1))
    batch.read[1] = 1  # V2 alone reads prompts in pieces, so only its rows are looked at
    batch.v1 = SimpleNamespace(apply_v1=lambda logits_RV: _one_hot(logits_RV, classes.pad))
    tokens = batch.step(torch.zeros(2, len(classes.text_V)))
    assert tokens[0] == classes.pad


def _one_hot(logits_RV: Tensor, token: int) -> Tensor:
    logits_RV.fill_(-torch.inf)[:, token] = 0
    return logits_RV


def test_v1_follows_the_moves_of_the_batch(classes: TokenClasses) -> None:
    rules = Rules(classes, ImageForm(classes.form.vocabulary, CODES), CONTEXT, PLACES)
    text = int(classes.text_V.nonzero()[0])
    kinds = {
        "text": RowRequest(GenerationOptions(force=Force.TEXT)),
        "image": RowRequest(GenerationOptions(force=Force.IMAGE)),
        "plain": RowRequest(GenerationOptions(temperature=0, images=False)),
    }
    added = [
        (place, params(kinds[name], 20), [classes.bos, text], [])
        for place, name in enumerate(("text", "image", "plain"))
    ]
    rules.update_rows(Update(added=added))
    rules.update_rows(Update(moved=[(0, 1, Direction.SWAP)]))
    assert [rules.rows[place].request for place in range(3)] == [
        kinds["image"], kinds["text"], kinds["plain"],
    ]  # fmt: skip
    rules.update_rows(Update(removed=[0], moved=[(2, 0, Direction.UNIDIRECTIONAL)]))
    assert {place: row.request for place, row in rules.rows.items()} == {
        0: kinds["plain"], 1: kinds["text"],
    }  # fmt: skip
    replaced = replace(kinds["image"], drawn=1)
    rules.update_rows(Update(added=[(1, params(replaced, 20), [classes.bos], [])]))
    logits_RV = torch.zeros(2, len(classes.text_V))
    logits_RV[0, text] = 9.0
    assert rules.apply_v1(logits_RV).argmax(1).tolist() == [text, classes.begin_image]
    assert rules.update_rows(None) is None


@pytest.mark.parametrize("seed", range(4))
def test_images_of_any_shape_are_the_grids_that_they_announce(seed: int) -> None:
    """Whatever the logits are and however many tokens an answer may have, in both runners."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    classes, batch, grids = ShapedModel.classes, Batch(ShapedModel.classes, SHAPED_FORM), 0
    for number in range(6):
        force = Force.IMAGE if number % 2 else None
        size = rng.choice([None, "1:1", "2:1", "1:3"])
        options = GenerationOptions(
            temperature=rng.choice([0, 2.0]), force=force, size=size, seed=number
        )
        needed = SHAPED_FORM.tokens_needed(size)
        batch.add(RowRequest(options), [classes.bos], rng.randint(needed, CONTEXT - 1))
    for _ in range(CONTEXT - 1):
        kinds = torch.tensor([0.0, 3.0, 1e30])[torch.randint(3, (6, 1), generator=generator)]
        logits_RV = kinds * torch.randn(6, len(classes.text_V), generator=generator)
        logits_RV[:, [classes.begin_image, classes.eos]] += torch.tensor([8.0, -99.0])
        batch.take(batch.step(logits_RV))
    rows = [batch.v1.rows[row] for row in range(6)]
    for row, answer in zip(rows, batch.answers, strict=True):
        options, at = row.request.options, 0
        answer = answer[: row.room]
        for _ in range(1 if options.force else answer.count(classes.begin_image)):
            begin = answer.index(classes.begin_image, at)
            at = answer.index(classes.end_image, begin)
            grid, _ = SHAPED.read_image(answer[begin + 1 : at])
            assert SHAPED_FORM.grid_of_size(options.size) in (None, grid)
            grids += 1
    assert grids >= 4  # three are forced
