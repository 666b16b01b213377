"""Generation by the project's decoder, with transformers' model and random weights.

A step cannot be faster than reading every parameter once, which takes 2 bytes x parameters /
measured memory bandwidth. Caches are not counted. The modes are: the kernels of a step launched one
by one, a step replayed as a CUDA graph, and a graph with compiled layers, without and with tuning
of the matrix products.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.common import (
    Context,
    Figures,
    LeftOutError,
    ToleranceError,
    median_and_spread,
    need_gpu,
    time_calls,
)
from benchmarks.gpu.models.engines import preset_config, vocab_size
from benchmarks.training.train_step import transformers_config
from benchmarks.vocabulary import word_tokens
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.inference.engine.row_settings import RowSettings
from megatron_chameleon.inference.engine.sampling import draw
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.parallel import platform
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

PROMPT_TOKENS = 32
SHORT_TOKENS = 8
GRAPH = Execution.on("cuda")
MODES = {
    "eager": replace(GRAPH, graph=False),
    "graph": GRAPH,
    "graph, compiled": replace(GRAPH, compiler="inductor"),
    "graph, compiled and tuned": replace(GRAPH, compiler="inductor:max-autotune-no-cudagraphs"),
    "traced for compilation": replace(GRAPH, graph=False, compiler="aot_eager"),
}
GUIDANCE: dict[str, dict[str, float]] = {
    "no guidance": {},
    "guidance of 2 passes": {"guidance": 3.0},
    "guidance of 3 passes": {"guidance": 3.0, "guidance_image": 1.2},
}


def run(context: Context) -> None:
    opened: list[Any] = []

    def generator() -> "Generator":
        if not opened:
            opened.append(Generator(context))
        return opened[0]

    tokens, codes = (16, 16) if context.tiny else (256, 1024)
    last = "traced for compilation" if context.tiny else "graph, compiled and tuned"

    def text(batch: int, mode: str) -> None:
        context.row(
            f"text, batch {batch}, {tokens} tokens, {mode}",
            lambda: generator().text_figures(batch, tokens, mode),
            "prefill is subtracted by means of a shorter answer",
        )

    def image(batch: int, guidance: str, mode: str) -> None:
        context.row(
            f"image block, batch {batch}, {codes:,} codes, {guidance}, {mode}",
            lambda: generator().image_figures(batch, codes, guidance, mode),
            "prefill included",
        )

    for mode in ("eager", "graph", "graph, compiled"):
        text(1, mode)
    measure_choices(context, generator)
    measure_prefill(context, generator)
    for guidance in GUIDANCE:
        image(1, guidance, "eager" if context.tiny else "graph, compiled")
    for mode in ("graph", "graph, compiled"):
        text(32, mode)
    for guidance in GUIDANCE:
        image(32, guidance, "graph, compiled")
    text(1, last)


def measure_choices(context: Context, generator: Callable[[], "Generator"]) -> None:
    """Rows of the choice of the next token alone."""
    for batch, vocabulary in ((1, True), (32, True), (1, False), (32, False)):
        over = "the vocabulary" if vocabulary else "the codes"
        context.row(
            f"choice over {over}, batch {batch}",
            lambda batch=batch, vocabulary=vocabulary: generator().choice_figures(
                batch, vocabulary
            ),
            "top_p and draw, kernels launched one by one",
        )


def measure_prefill(context: Context, generator: Callable[[], "Generator"]) -> None:
    """Rows of the pass over the prompt."""
    for batch, length in ((1, 64), (2, 64)) if context.tiny else ((1, 1024), (1, 4000), (32, 512)):
        context.row(
            f"prefill, batch {batch}, {length:,} tokens",
            lambda batch=batch, length=length: generator().prefill_figures(batch, length),
        )


class Generator:
    """The 7B as transformers' model, with its vocabulary and token classes, on this device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._model_config = preset_config(
            "chameleon_7b", context.tiny, 2 if context.tiny else 32
        ).model
        self._model_config.seq_length = 4096  # positions; an image and its prompt must fit
        vocab = vocab_size(context.tiny)
        codes = 32 if context.tiny else 8192
        vocabulary = Vocabulary.from_tokens(word_tokens(vocab, codes))
        self.classes = TokenClasses(vocabulary, platform.device())
        self.model = build_transformers(self._model_config, vocab)
        self.parameters = count_parameters(self._model_config, vocab)
        self._text: dict[int, Sequence[int]] = {}
        """The eager answer's tokens, by batch size."""

    def text_figures(self, batch: int, tokens: int, mode: str) -> Figures:
        decoder, requests = (
            self._decoder(1, mode),
            self._requests(batch, GenerationOptions(images=False)),
        )
        max_new_tokens = (SHORT_TOKENS + tokens, SHORT_TOKENS)
        begin = time.perf_counter()
        answer = answer_all(decoder, requests(max_new_tokens[0]))
        figures: Figures = {"first answer s": time.perf_counter() - begin}
        self._compare(batch, answer[0], mode, figures)
        if len(answer[0]) <= SHORT_TOKENS:
            raise LeftOutError(f"the answer ended after {len(answer[0])} tokens")
        repeats = 3 if decoder.execution.graph else 1
        long, short = (
            median_and_spread(
                time_calls(
                    lambda count=count: answer_all(decoder, requests(count)),
                    repeats=repeats,
                    warmup=1,
                )
            )[0]
            for count in max_new_tokens
        )
        steps = max(map(len, answer)) - SHORT_TOKENS
        return self._figures(batch, (long - short) / steps, {"steps": steps, **figures})

    def _compare(self, batch: int, answer: Sequence[int], mode: str, figures: Figures) -> None:
        """Require a graph to draw the tokens of single launches; compiled code may differ."""
        if mode == "eager":
            self._text[batch] = answer
        expected = self._text.get(batch)
        if expected is None or mode == "eager":
            return
        same = next(
            (i for i, pair in enumerate(zip(expected, answer, strict=False)) if len({*pair}) > 1),
            len(answer),
        )
        figures["tokens as eager"] = same
        if mode == "graph" and same < len(expected):
            raise ToleranceError(figures, f"token {same} differs from that of single launches")

    def image_figures(self, batch: int, codes: int, guidance: str, mode: str) -> Figures:
        options = GenerationOptions(force=Force.IMAGE, **GUIDANCE[guidance])
        decoder = self._decoder(codes, mode)
        requests = self._requests(batch, options)(codes + 2)
        answer_all(decoder, requests)
        times = time_calls(lambda: answer_all(decoder, requests), repeats=1, warmup=0)
        figures: Figures = {"s per block": times[0], "images/s": batch / times[0]}
        return self._figures(batch, times[0] / (codes + 2), {"steps": codes + 2, **figures})

    def prefill_figures(self, batch: int, length: int) -> Figures:
        """Measure the prefill of prompts of one length, with the draw of one token."""
        decoder = self._decoder(1, "eager")
        requests = self._requests(batch, GenerationOptions(temperature=0, images=False), length)(1)
        times = time_calls(
            lambda: answer_all(decoder, requests), repeats=2 if self._context.tiny else 5
        )
        seconds, spread = median_and_spread(times)
        rate = 2 * self.parameters * batch * length / seconds / 1e12
        figures: Figures = {"tokens/s": batch * length / seconds, "ms": seconds * 1e3}
        figures |= {"TFLOP/s": rate, "spread": spread}
        if ceiling := self._context.ceiling("bf16 matmul", "TFLOP/s"):
            figures["of the bf16 matmul"] = rate / ceiling
        return figures

    @torch.inference_mode()
    def choice_figures(self, batch: int, vocabulary: bool) -> Figures:
        device = platform.device()
        count = len(self.classes.code_V) if vocabulary else len(self.classes.code_token_ids)
        logits = torch.randn(batch, count, device=device)
        uniform = torch.rand(batch, dtype=torch.float64, device=device)
        settings = RowSettings.of([GenerationOptions()] * batch, device)
        times = time_calls(lambda: draw(logits, settings, uniform), repeats=20)
        seconds, spread = median_and_spread(times)
        return {"ms": seconds * 1e3, "spread": spread}

    def _decoder(self, codes: int, mode: str) -> ContinuousDecoder:
        execution = MODES[mode]
        if execution.graph:
            need_gpu("CUDA graphs need a GPU")
        layers = TransformersLayers(self.model, self.classes.code_token_ids, execution.compiler)
        form = ImageForm(self.classes.form.vocabulary, codes)
        return ContinuousDecoder(layers, self.classes, form, execution, max_rows=96)

    def _requests(
        self, batch: int, options: GenerationOptions, length: int = PROMPT_TOKENS
    ) -> Callable[[int], list[TokenRequest]]:
        """Requests of equal prompts, for a number of new tokens."""
        word = int(self.classes.text_V.nonzero()[0])
        prompt = (self.classes.bos, *[word] * (length - 1))
        return lambda tokens: [
            TokenRequest(prompt, tokens, replace(options, seed=seed)) for seed in range(batch)
        ]

    def _figures(self, batch: int, seconds: float, others: Figures) -> Figures:
        figures: Figures = {"tokens/s": batch / seconds, "ms per step": seconds * 1e3, **others}
        if bandwidth := self._context.ceiling("copy", "GB/s"):
            width = next(self.model.parameters()).element_size()
            limit = width * self.parameters / bandwidth / 1e9
            figures |= {"limit ms": limit * 1e3, "of the limit": limit / seconds}
        return figures


def answer_all(decoder: ContinuousDecoder, requests: Sequence[TokenRequest]) -> list[list[int]]:
    """The tokens of the answers to requests that come at the same time."""
    answers: dict[int, list[int]] = {decoder.add(request): [] for request in requests}
    while decoder.usage().running + decoder.usage().waiting:
        for number, chunk in decoder.step():
            if isinstance(chunk, Exception):
                raise chunk
            answers[number] += chunk.token_ids
    return list(answers.values())


def build_transformers(model: Any, vocab: int) -> Any:
    """Build transformers' Chameleon in bf16 with random weights on this device.

    Its image tokenizer is tiny, because it is not called.
    """
    from transformers import ChameleonForConditionalGeneration

    config = transformers_config(model, vocab)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(platform.device()):
            built = ChameleonForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return built.to(torch.bfloat16).eval().requires_grad_(False)
