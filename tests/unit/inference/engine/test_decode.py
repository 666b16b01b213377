"""Sampling rules, and cached, left-padded batches compared with plain forward passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.engine import context as context_module
from megatron_chameleon.inference.engine import decode as decode_module
from megatron_chameleon.inference.engine import sampling as sampling_module
from megatron_chameleon.inference.engine.context import BatchContext
from megatron_chameleon.inference.engine.decode import BatchDecoder, Execution, collect, decode
from megatron_chameleon.inference.engine.guidance import Conditioning, Guidance
from megatron_chameleon.inference.engine.modality import Force, ModalityState, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session
from megatron_chameleon.parallel import cuda_graphs
from recorded_ops import RecordedOps

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
"""fp32 sums in a different order differ by up to 1.6e-6, observed on logits up to 4."""
CODES = 16
WIDE = Execution(sync_every_tokens=7, width_step=16)


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def classes(session: Session) -> TokenClasses:
    return TokenClasses(session.tokenizer.vocabulary)


def image(session: Session, first: int) -> list[int]:
    """Token ids of some image."""
    vocabulary = session.tokenizer.vocabulary
    codes = vocabulary.code_token_ids[(first + torch.arange(CODES).numpy() * 3) % 16]
    return [vocabulary.begin_image, *codes.tolist(), vocabulary.end_image]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerationOptions(temperature=-1), "temperature: -1 is not 0 or more"),
        (GenerationOptions(top_p=0), "top_p: 0 is not above 0 and at most 1"),
        (GenerationOptions(max_tokens=0), "max_tokens: 0 is not above 0"),
        (GenerationOptions(guidance_image=-0.5), "guidance_image: -0.5 is not 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: GenerationOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.check()


def test_steps_read_rounded_widths() -> None:
    widths = Execution.on("cuda").width
    assert [widths(columns) for columns in (1, 256, 257)] == [256, 256, 512]
    assert Execution.on("cpu").width(77) == 77


def logits_alone(session: Session, token_ids: list[int]) -> torch.Tensor:
    """transformers' own forward pass of one sequence, without a cache: [S, V]."""
    model = session.model
    return model.lm_head(model.model(input_ids=torch.tensor([token_ids])).last_hidden_state)[0]


@torch.inference_mode()
@pytest.mark.parametrize("width", [0, 40])
def test_padded_rows_with_a_cache_give_the_logits_of_rows_alone(
    session: Session, width: int
) -> None:
    """Texts and an image, in groups with their own padding, through steps of any width."""
    sequences = [
        [0, 40, 50, 60, 70, 71],
        [0, 9, 12, 13],
        [0, *image(session, 2), 30, 31, 32],
        [0, 77, 78],
    ]
    context = BatchContext(session.model, 4)
    context.reserve(60)
    for cache in context._caches:  # like memory that has not been written
        cache.keys_RGCD.fill_(torch.nan), cache.values_RGCD.fill_(torch.nan)
    prompts = [sequence[:-2] for sequence in sequences]
    found = [context.logits(context.start([prompts[:3], prompts[3:]], pad=1))]
    columns = max(map(len, prompts))
    for column in (-2, -1):
        columns += 1
        context.widen(columns, width or columns)
        tokens = torch.tensor([sequence[column] for sequence in sequences])
        found.append(context.logits(context.step(tokens, torch.ones(4, dtype=torch.bool))))
    for row, sequence in enumerate(sequences):
        alone = logits_alone(session, sequence)[-3:]
        torch.testing.assert_close(torch.stack([step[row] for step in found]), alone, **CLOSE)


@torch.inference_mode()
def test_hidden_columns_take_no_position_and_buffers_grow(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "CAPACITY_STEP", 4)
    monkeypatch.setattr(context_module, "ODD_COLUMNS", 0)
    context = BatchContext(session.model, 2, forgetful_R=torch.tensor([True, False]))
    assert context.reserve(3) and context.capacity == 4
    context.start([[[0, 40], [0, 41]]], pad=1)
    seen = ((50, True, True), (99, False, False), (60, True, True), (61, True, False))
    for number, (token_id, *visible) in enumerate(seen):
        assert context.widen(3 + number, 3 + number) == (number == 2)
        last = context.step(torch.tensor([token_id, token_id]), torch.tensor(visible))
    assert context.capacity == 8
    logits = context.logits(last)
    # The first row forgot 50 when 99 was hidden from it. The second row did not see 61 later.
    torch.testing.assert_close(logits[0], logits_alone(session, [0, 40, 60, 61])[-1], **CLOSE)
    context.widen(7, 7)
    last = context.step(torch.tensor([62, 62]), torch.tensor([True, True]))
    alone = logits_alone(session, [0, 41, 50, 60, 62])[-1]
    torch.testing.assert_close(context.logits(last)[1], alone, **CLOSE)


OPTIONS = {
    "mixed": GenerationOptions(temperature=1.0, top_p=1.0, seed=17),
    "text": GenerationOptions(force=Force.TEXT, repetition_penalty=1.0, top_k=30),
    "image": GenerationOptions(force=Force.IMAGE, top_p=0.8),
    "guided": GenerationOptions(force=Force.IMAGE, guidance=3.0, guidance_image=1.2),
    "guided, mixed": GenerationOptions(
        temperature=1.0, top_p=1.0, guidance=3.0, guidance_image=1.2, seed=17
    ),
    "greedy": GenerationOptions(temperature=0),
}


@torch.inference_mode()
def drawn_without_cache(
    session: Session,
    prompts: list[list[int]],
    options: GenerationOptions,
    max_new_tokens: list[int],
) -> list[list[int]]:
    """The definition of decoding: every row alone, its whole sequence computed again for each token
    and each pass, and a distribution inverted over sorted probabilities."""
    classes = TokenClasses(session.tokenizer.vocabulary)
    state = ModalityState(
        classes, CODES, torch.tensor(max_new_tokens), images=options.images, force=options.force
    )
    generator = torch.Generator().manual_seed(options.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    while not state.finished_B.all():
        logits = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            full = logits_alone(session, prompt + answer)[-1]
            if state.in_image_B[row]:
                full = guided_alone(session, prompt, answer, options)
            seen = [t for t in {*prompt, *answer} if classes.text_V[t]]
            penalty = options.repetition_penalty
            full[seen] = torch.where(full[seen] > 0, full[seen] / penalty, full[seen] * penalty)
            logits.append(full)
        masked = torch.stack(logits).masked_fill(~state.allowed(), -torch.inf)
        tokens = by_inversion(masked, options, generator)
        for row, token in enumerate(tokens.tolist()):
            if not state.finished_B[row]:
                answers[row].append(token)
        state.advance(tokens)
    return answers


def by_inversion(
    logits: torch.Tensor, options: GenerationOptions, generator: torch.Generator
) -> torch.Tensor:
    if options.temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    scaled = logits.double() / options.temperature
    ids = torch.arange(logits.shape[1]).expand(len(logits), -1)
    if options.top_k or options.top_p < 1:
        scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        scaled[:, options.top_k :] = -torch.inf
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    if options.top_p < 1:
        probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
    ends = probabilities.cumsum(-1)
    place = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)
    return ids.gather(1, place)[:, 0]


def guided_alone(
    session: Session, prompt: list[int], answer: list[int], options: GenerationOptions
) -> torch.Tensor:
    """The logits of a code by the reference's formula, with each pass as a sequence of its own."""
    vocabulary = session.tokenizer.vocabulary
    images = {*vocabulary.code_token_ids.tolist(), vocabulary.begin_image, vocabulary.end_image}
    begun = len(answer) - 1 - answer[::-1].index(vocabulary.begin_image)
    sequences = (
        prompt + answer,
        [vocabulary.bos, *(token for token in prompt + answer if token in images)],
        [vocabulary.bos, *answer[begun:]],
    )
    everything, pictures, nothing = (logits_alone(session, ids)[-1] for ids in sequences)
    text_scale = options.guidance
    image_scale = text_scale if options.guidance_image is None else options.guidance_image
    return nothing + image_scale * (pictures - nothing) + text_scale * (everything - pictures)


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_the_definition(
    session: Session, classes: TokenClasses, name: str
) -> None:
    """For the same seed. Rows of different lengths, one with an image, form one batch."""
    options = OPTIONS[name]
    prompts = [[0, 100, 110, 120], [0, 90, *image(session, 1), 91], [0]]
    max_new_tokens = [40, 43, 35]
    expected = drawn_without_cache(session, prompts, options, max_new_tokens)
    if "mixed" in name:
        assert any(classes.begin_image in answer for answer in expected)
    for execution in (None, WIDE):
        generator = torch.Generator().manual_seed(options.seed)
        found = decode(
            session.model, prompts, classes, CODES, max_new_tokens, options, generator, execution
        )
        assert found == expected


def test_scales_choose_the_passes() -> None:
    def passes(*scales: float | None) -> list[str]:
        options = GenerationOptions(guidance=scales[0] or 1.0, guidance_image=scales[1])
        return [kind.value for kind in Guidance.of(options).passes]

    assert passes(1.0, None) == ["all"]
    assert passes(3.0, None) == passes(3.0, 3.0) == ["all", "nothing"]
    assert passes(3.0, 1.2) == ["all", "images", "nothing"]
    assert passes(3.0, 1.0) == ["all", "images"]


def test_each_scale_is_that_of_the_formula() -> None:
    full, images, nothing = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    for text, image_scale in ((3.0, 1.2), (3.0, 3.0), (3.0, 1.0), (1.0, 1.2), (1.0, 1.0)):
        guidance = Guidance.of(GenerationOptions(guidance=text, guidance_image=image_scale))
        logits = {
            Conditioning.ALL: full,
            Conditioning.IMAGES: images,
            Conditioning.NOTHING: nothing,
        }
        mixed = guidance.mix(torch.cat([logits[kind] for kind in guidance.passes]))
        expected = nothing + image_scale * (images - nothing) + text * (full - images)
        torch.testing.assert_close(mixed, expected)


def test_each_pass_sees_its_share_of_an_answer(classes: TokenClasses) -> None:
    """Rows in an image, at the beginning of one, after the end of one, in text, and finished."""
    guidance = Guidance.of(GenerationOptions(guidance=3.0, guidance_image=1.2))
    state = ModalityState(classes, CODES, torch.full((5,), 40))
    state.codes_left_B.copy_(torch.tensor([3, 16, -1, -1, -1]))
    code, word = int(classes.code_token_ids[0]), int(classes.text_V.nonzero()[0])
    tokens = torch.tensor([code, classes.begin_image, classes.end_image, word, classes.pad])
    active = torch.tensor([True, True, True, True, False])
    everything, images, nothing = guidance.visible(active, tokens, state).chunk(3)
    assert everything.tolist() == [True, True, True, True, False]
    assert images.tolist() == [True, True, True, False, False]
    assert nothing.tolist() == [True, True, False, False, False]


def test_a_decoder_answers_one_batch_after_the_other(
    session: Session, classes: TokenClasses
) -> None:
    """What earlier answers left in the buffers is not seen, even if they were longer."""
    options = GenerationOptions(guidance=3.0, guidance_image=1.2, temperature=1.0)
    decoder = BatchDecoder(session.model, classes, CODES, 2, options, WIDE)
    batches = [[[0, 5, 6, *image(session, 3)], [0, 70]], [[0, 80], [0, 81, 82]]]
    generator, other = (torch.Generator().manual_seed(4) for _ in range(2))
    for prompts, max_new_tokens in zip(batches, ([40, 41], [30, 50]), strict=True):
        found = collect(decoder.stream(prompts, max_new_tokens, generator))
        assert found == decode(
            session.model, prompts, classes, CODES, max_new_tokens, options, other, WIDE
        )


def test_tokens_come_as_they_are_drawn(session: Session, classes: TokenClasses) -> None:
    options = GenerationOptions(images=False)
    decoder = BatchDecoder(session.model, classes, CODES, 2, options, WIDE)
    prompts = [[0, 100], [0, 90, 91]]
    pieces = list(decoder.stream(prompts, [20, 4], torch.Generator().manual_seed(1)))
    assert [[len(row) for row in piece] for piece in pieces] == [[7, 4], [7, 0], [6, 0]]


@pytest.mark.parametrize("name", ["mixed", "guided", "guided, mixed"])
def test_a_step_can_be_replayed(
    session: Session,
    classes: TokenClasses,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a CUDA graph: the operations of one step are repeated on the same memory, with the same
    numbers from the host. An operation that waits for the device is refused."""
    recordings: list[RecordedOps] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        recordings.append(RecordedOps(step))
        return recordings[-1]

    monkeypatch.setattr(cuda_graphs, "graph_recorder", lambda generator: record)
    monkeypatch.setattr(sampling_module, "reading_is_free", lambda device: False)
    # buffers move in the middle of an answer, which invalidates everything recorded before
    monkeypatch.setattr(context_module, "CAPACITY_STEP", 8)
    monkeypatch.setattr(context_module, "ODD_COLUMNS", 0)
    monkeypatch.setattr(decode_module, "RESERVED_TOKENS", 4)
    prompts, max_new_tokens = [[0, 100, 110, 120], [0, 90, *image(session, 1)]], [44, 43]
    options = OPTIONS[name]
    answers = []
    for graph in (False, True):
        generator = torch.Generator().manual_seed(2)
        execution = Execution(graph, None, WIDE.sync_every_tokens, WIDE.width_step)
        decoder = BatchDecoder(session.model, classes, CODES, 2, options, execution)
        for _ in range(2):
            answers.append(collect(decoder.stream(prompts, max_new_tokens, generator)))
    assert answers[:2] == answers[2:]
    assert sum(recording.replays for recording in recordings) > 20


def test_compiled_layers_give_the_same_tokens(session: Session, classes: TokenClasses) -> None:
    """Only tracing and functionalisation are tested; one compilation serves all layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prompts, max_new_tokens = [[0, 100, 110], [0, 90, 91, 92, 93]], [30, 31]
    options = GenerationOptions(temperature=0, images=False)
    answers = [
        decode(
            session.model,
            *(prompts, classes, CODES, max_new_tokens, options, torch.Generator()),
            Execution(compiler=compiler, width_step=16),
        )
        for compiler in (None, "aot_eager")
    ]
    assert answers[0] == answers[1]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2  # after the second width, the width is a variable
