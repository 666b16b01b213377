"""Generation by the project's ``decode`` over transformers' model with random weights.

A step cannot be faster than reading every parameter once: 2 bytes x parameters / measured memory
bandwidth. Caches are not counted.
"""

from typing import Any

import torch
from train_step import transformers_config

from gpu_parts.common import Context, Figures, LeftOutError, time_calls
from gpu_parts.engines import preset_config, vocab_size
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.inference.decode import GenerationOptions, decode
from megatron_chameleon.inference.modality import Force, TokenClasses
from megatron_chameleon.parallel import platform
from megatron_chameleon.tokenizer.vocabulary import (
    BOS,
    EOS,
    PAD,
    UNK,
    Vocabulary,
    control_names,
)

PROMPT_TOKENS = 32
SHORT_TOKENS = 8


def run(context: Context) -> None:
    opened: list[Any] = []

    def generator() -> "Generator":
        if not opened:
            opened.append(Generator(context))
        return opened[0]

    tokens, codes = (16, 16) if context.tiny else (256, 1024)
    for batch in (1, 32):
        context.row(
            f"text, batch {batch}, {tokens} tokens",
            lambda batch=batch: generator().text_figures(batch, tokens),
            "prefill taken out by a shorter answer",
        )
    for batch in (1, 32):
        context.row(
            f"image block, batch {batch}, {codes:,} codes",
            lambda batch=batch: generator().image_figures(batch, codes),
            "prefill included",
        )


class Generator:
    """The 7B in transformers, its vocabulary and its token classes on this device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._model_config = preset_config(
            "chameleon_7b", context.tiny, 2 if context.tiny else 32
        ).model
        self._model_config.seq_length = 4096  # positions; an image and its prompt must fit
        vocab = vocab_size(context.tiny)
        codes = 32 if context.tiny else 8192
        names = [BOS, PAD, EOS, UNK, *control_names(codes)]
        names += [f"word{number}" for number in range(vocab - len(names))]
        self.classes = TokenClasses(Vocabulary.from_tokens(names), platform.device())
        self.model = build_transformers(self._model_config, vocab)
        self.parameters = count_parameters(self._model_config, vocab)

    def answer(self, batch: int, room: int, codes: int, options: GenerationOptions) -> int:
        """Answer a batch; returns the columns that were drawn."""
        first = int(self.classes.text_V.nonzero()[0])
        prompts = [[self.classes.bos] + [first] * (PROMPT_TOKENS - 1)] * batch
        draws = torch.Generator(platform.device()).manual_seed(1)
        rows = decode(self.model, prompts, self.classes, codes, [room] * batch, options, draws)
        return max(len(row) for row in rows)

    def text_figures(self, batch: int, tokens: int) -> Figures:
        options = GenerationOptions(images=False, force=Force.TEXT)
        lengths, seconds = [], []
        for room in (SHORT_TOKENS, SHORT_TOKENS + tokens):
            columns: list[int] = []
            times = time_calls(
                lambda room=room, columns=columns: columns.append(
                    self.answer(batch, room, 1, options)
                ),
                repeats=2 if self._context.tiny else 3,
                warmup=1,
            )
            lengths.append(columns[-1])
            seconds.append(sorted(times)[len(times) // 2])
        steps = lengths[1] - lengths[0]
        if steps <= 0:
            raise LeftOutError(f"the answers ended by themselves after {lengths[1]} tokens")
        return self._figures(batch, (seconds[1] - seconds[0]) / steps, {"steps": steps})

    def image_figures(self, batch: int, codes: int) -> Figures:
        options = GenerationOptions(force=Force.IMAGE)
        columns: list[int] = []
        times = time_calls(
            lambda: columns.append(self.answer(batch, codes + 2, codes, options)),
            repeats=1,
            warmup=1 if self._context.tiny else 0,
        )
        figures = {"steps": columns[-1], "s a block": times[0], "images/s": batch / times[0]}
        return self._figures(batch, times[0] / columns[-1], figures)

    def _figures(self, batch: int, seconds: float, others: Figures) -> Figures:
        figures: Figures = {"tokens/s": batch / seconds, "ms a step": seconds * 1e3, **others}
        if bandwidth := self._context.ceiling("copy", "GB/s"):
            width = next(self.model.parameters()).element_size()
            limit = width * self.parameters / bandwidth / 1e9
            figures |= {"limit ms": limit * 1e3, "of the limit": limit / seconds}
        return figures


def build_transformers(model: Any, vocab: int) -> Any:
    """transformers' Chameleon in bf16 with random weights on this device; a tiny image tokenizer,
    which is not called."""
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
