"""Answers of all kinds, together and alone, compared with plain forward passes of each alone."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.inference.engine import sampling as sampling_module
from megatron_chameleon.inference.engine.batching import cache as cache_module
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.interface import FinishReason, TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.parallel import cuda_graphs
from recorded_ops import RecordedOps
from tiny_decoder import CODES, Tiny, answer_all

WINDOWS = Execution(sync_every_tokens=7, width_step=16, buckets=True)


def requests_of_all_kinds(tiny: Tiny, count: int = 30) -> list[TokenRequest]:
    """Greedy requests with and without images, guidance, penalties and limits."""
    rng = random.Random(1)
    words = tiny.classes.text_V.nonzero()[:, 0].tolist()
    requests = []
    for number in range(count):
        prompt = [tiny.vocabulary.bos, *rng.choices(words, k=rng.randint(0, 12))]
        prompt += tiny.image(number) if number % 3 == 0 else []
        prompt += rng.choices(words, k=number % 5 == 0)
        kind = (
            {"guidance": 2.0, "guidance_image": 1.0, "force": rng.choice([None, Force.IMAGE])},
            {"force": Force.TEXT},
            {"force": Force.IMAGE, "guidance": 3.0},
            {"guidance": 3.0},
            {"guidance": 3.0, "guidance_image": 1.2},
            {"images": False},
        )[number % 6]
        penalty = rng.choice([1.0, 1.2, 1.7])
        options = GenerationOptions(temperature=0, repetition_penalty=penalty, **kind)
        room = 64 - len(prompt)
        shorter = rng.randint(1, room) if number % 6 == 5 else room
        requests.append(TokenRequest(tuple(prompt), shorter, options))
    return requests


def chosen_alone(tiny: Tiny, request: TokenRequest, answer: list[int]) -> list[int]:
    """The definition of a greedy answer: the token to choose after each beginning of ``answer``.

    The model reads each sequence of a pass as a whole, without a cache. An answer that is its own
    choice, token by token, is the greedy one.
    """
    classes, options, image_tokens = tiny.classes, request.options, CODES + 2
    prompt, chosen = list(request.prompt), []
    after = tiny.logits(prompt + answer)[len(prompt) - 1 :]
    for place in range(len(answer)):
        before = answer[:place]
        begins = [i for i, token in enumerate(before) if token == classes.begin_image]
        inside = place - begins[-1] if begins else image_tokens
        logits = after[place].clone()
        if inside < image_tokens and options.guidance != 1:
            logits = guided_alone(tiny, prompt, before, begins[-1], options)
        for token in {*prompt, *before} if options.repetition_penalty != 1 else ():
            if classes.text_V[token]:
                sign = -1 if logits[token] > 0 else 1
                logits[token] *= options.repetition_penalty**sign
        if inside < image_tokens:
            allowed = classes.code_V if inside <= CODES else only(tiny, classes.end_image)
        elif options.force is Force.IMAGE:
            allowed = only(tiny, classes.begin_image)
        else:
            allowed = classes.text_V | only(tiny, classes.eos)
            fits = request.max_new_tokens - place >= image_tokens
            if fits and options.images and options.force is None:
                allowed = allowed | only(tiny, classes.begin_image)
        chosen.append(int(logits.masked_fill(~allowed, -torch.inf).argmax()))
    return chosen


def only(tiny: Tiny, token: int) -> torch.Tensor:
    allowed = torch.zeros_like(tiny.classes.text_V)
    allowed[token] = True
    return allowed


def guided_alone(
    tiny: Tiny, prompt: list[int], answer: list[int], begun: int, options: GenerationOptions
) -> torch.Tensor:
    """The logits of a code by the reference's formula, with each pass as a sequence of its own."""
    images, bos = tiny.classes.image_token_ids, tiny.classes.bos
    sequences = (
        prompt + answer,
        [bos, *(token for token in prompt + answer if token in images)],
        [bos, *answer[begun:]],
    )
    everything, pictures, nothing = (tiny.logits(ids)[-1] for ids in sequences)
    text_scale = options.guidance
    image_scale = text_scale if options.guidance_image is None else options.guidance_image
    return nothing + image_scale * (pictures - nothing) + text_scale * (everything - pictures)


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[list[int]]:
    """The answer of each request alone, which is that of the definition."""
    answers = []
    for request in requests_of_all_kinds(tiny):
        (answer,) = answer_all(tiny.decoder(), [request])
        assert answer == chosen_alone(tiny, request, answer)
        ends = {tiny.classes.eos} if request.options.force is not Force.IMAGE else {answer[17]}
        assert answer[-1] in ends or len(answer) == request.max_new_tokens
        assert not ends & set(answer[:-1])
        answers.append(answer)
    drawn = [tiny.classes.begin_image in answer for answer in answers]
    assert 8 < sum(drawn) < 25, "the answers should differ in kind"
    return answers


@pytest.mark.parametrize(
    ("joining", "settings"),
    [
        (None, {}),
        (1, {}),
        (3, {"execution": WINDOWS}),
        (2, {"execution": Execution(sync_every_tokens=5)}),
        (None, {"max_rows": 5}),
        (None, {"cache_tokens": 600}),
    ],
)
def test_answers_are_those_of_each_request_alone(
    tiny: Tiny, expected: list[list[int]], joining: int | None, settings: dict
) -> None:
    """At once, joining one by one, read in windows, with few rows, and with little memory."""
    decoder = tiny.decoder(**settings)
    assert answer_all(decoder, requests_of_all_kinds(tiny), joining) == expected
    usage = decoder.usage()
    assert (usage.running, usage.waiting, usage.cache_tokens_used) == (0, 0, 0)


def test_narrow_shelves_and_little_memory_change_no_answer(
    tiny: Tiny, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move between shelves of 9, 17, 33 and 65 columns, and give way to older ones."""
    monkeypatch.setattr(cache_module, "NARROWEST_COLUMNS", 8)
    monkeypatch.setattr(cache_module, "ODD_COLUMNS", 1)
    for execution in (Execution(), WINDOWS):
        decoder = tiny.decoder(execution, cache_tokens=330)
        used = []

        def watch(decoder=decoder, used=used) -> None:
            used.append(decoder.usage().cache_tokens_used)
            assert decoder._cache.held_tokens <= 330

        requests = requests_of_all_kinds(tiny)
        assert answer_all(decoder, requests, watch=lambda _: watch()) == expected
        assert max(used) > 200


def test_a_second_image_is_guided_without_the_first(tiny: Tiny) -> None:
    """The pass that sees nothing of the prompt forgets an image when it is complete."""
    rng = random.Random(3)
    words = tiny.classes.text_V.nonzero()[:, 0].tolist()
    requests = []
    for number in range(40):
        prompt = (tiny.vocabulary.bos, *rng.choices(words, k=rng.randint(0, 3)))
        options = GenerationOptions(
            temperature=0,
            repetition_penalty=1.7,
            guidance=3.0,
            guidance_image=1.2 if number % 2 else None,
        )
        requests.append(TokenRequest(prompt, 64 - len(prompt), options))
    answers = answer_all(tiny.decoder(), requests)
    assert answer_all(tiny.decoder(WINDOWS), requests, 3) == answers
    several = [
        (request, answer)
        for request, answer in zip(requests, answers, strict=True)
        if answer.count(tiny.classes.begin_image) > 1
    ]
    assert len({request.options for request, _ in several[:4]}) == 2, "of both kinds of guidance"
    for request, answer in several[:4]:
        assert answer == chosen_alone(tiny, request, answer)


def test_memory_for_keys_and_values_is_limited_in_bytes(tiny: Tiny) -> None:
    decoder = tiny.decoder()
    each = cache_module.bytes_per_token(decoder._model)
    with pytest.raises(ConfigError, match=r"hold 71 tokens, too few for any answer"):
        decoder.limit_cache(72 * each - 1)
    decoder.limit_cache(72 * each)
    assert decoder.usage().cache_tokens_total == 72
    guided = TokenRequest((tiny.vocabulary.bos,), 40, GenerationOptions(guidance=2.0))
    with pytest.raises(DataError, match=r"in 2 rows of guidance .* keeps at most 72 "):
        decoder.check(guided)
    decoder.check(replace(guided, options=GenerationOptions()))


def test_a_seeded_answer_does_not_depend_on_what_runs_beside_it(tiny: Tiny) -> None:
    requests = [
        replace(request, options=replace(request.options, temperature=1.0, top_p=0.95, seed=seed))
        for seed, request in enumerate(requests_of_all_kinds(tiny, 12))
    ]
    alone = [answer_all(tiny.decoder(), [request])[0] for request in requests]
    assert answer_all(tiny.decoder(), requests) == alone
    assert answer_all(tiny.decoder(WINDOWS, cache_tokens=600), requests[::-1], 4)[::-1] == alone
    other = replace(requests[0], options=replace(requests[0].options, seed=77))
    assert answer_all(tiny.decoder(), [other])[0] != alone[0]


def test_tokens_come_as_they_are_drawn(tiny: Tiny) -> None:
    decoder = tiny.decoder(Execution(sync_every_tokens=7))
    decoder.add(TokenRequest((0, 100), CODES + 2, GenerationOptions(force=Force.IMAGE)))
    decoder.add(TokenRequest((0,), 1, GenerationOptions()))
    chunks = [dict(decoder.step()) for _ in range(3)]
    assert [[len(chunk.token_ids) for chunk in step.values()] for step in chunks] == [
        [8, 1],
        [7],
        [3],
    ]
    assert [chunk.finish for chunk in chunks[0].values()] == [None, FinishReason.LENGTH]
    assert chunks[2][1].finish is FinishReason.STOP


def test_a_cancelled_answer_leaves_at_once(tiny: Tiny, expected: list[list[int]]) -> None:
    requests = requests_of_all_kinds(tiny)
    decoder = tiny.decoder(max_rows=20)
    answers: dict[int, list[int]] = {decoder.add(request): [] for request in requests}
    steps, cancelled = 0, set()
    while decoder.usage().running + decoder.usage().waiting:
        for number, chunk in decoder.step():
            assert number not in cancelled
            answers[number] += chunk.token_ids
        steps += 1
        if steps in (1, 4, 9):  # one that grows and one that waits
            for number in (steps, 31 - steps):
                cancelled.add(number)
                decoder.cancel(number)
    assert decoder.usage().cache_tokens_used == 0
    for number, answer in answers.items():
        if number not in cancelled:
            assert answer == expected[number - 1]


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_can_be_replayed(
    tiny: Tiny, expected: list[list[int]], graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a CUDA graph: the operations of one step are repeated on the same memory, with the same
    numbers from the host. An operation that waits for the device is refused."""
    recordings: list[RecordedOps] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        recordings.append(RecordedOps(step))
        return recordings[-1]

    monkeypatch.setattr(cuda_graphs, "graph_recorder", lambda: record)
    monkeypatch.setattr(sampling_module, "reading_is_free", lambda device: False)
    # rows move to wider shelves in the middle of an answer
    monkeypatch.setattr(cache_module, "NARROWEST_COLUMNS", 32)
    execution = replace(WINDOWS, graph=graph)
    assert answer_all(tiny.decoder(execution), requests_of_all_kinds(tiny), 4) == expected
    assert not graph or sum(recording.replays for recording in recordings) > 20


def test_compiled_layers_give_the_same_tokens(tiny: Tiny) -> None:
    """Only tracing and functionalisation are tested; one compilation serves all layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = GenerationOptions(temperature=0, images=False)
    requests = [TokenRequest((0, 90 + n), 12 + n, options) for n in range(3)]
    layers = TransformersLayers(tiny.model, tiny.classes.code_token_ids, "aot_eager")
    decoder = ContinuousDecoder(layers, tiny.classes, tiny.form)
    assert answer_all(decoder, requests) == answer_all(tiny.decoder(), requests)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 6  # two parts of a layer, for one row, a few, and any number of them
