"""A tiny model whose greedy answers mix text and images, and decoders of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.inference.session import Session
from megatron_chameleon.tokenizer.common.image_form import ImageForm

CODES = 16
"""Codes of an image."""


class Tiny:
    """The model, its vocabulary and its layers."""

    def __init__(self, session: Session) -> None:
        self.model, self.vocabulary = session.model, session.tokenizer.vocabulary
        # larger logits of either sign, so that a greedy answer of random weights has images too
        self.model.lm_head.weight[self.vocabulary.begin_image] *= 3
        self.model.lm_head.weight[self.vocabulary.eos] *= 2
        self.classes = TokenClasses(self.vocabulary)
        self.form = ImageForm(self.vocabulary, CODES)
        self.layers = TransformersLayers(self.model, self.classes.code_token_ids)

    def decoder(self, *execution: Any, **settings: Any) -> ContinuousDecoder:
        return ContinuousDecoder(self.layers, self.classes, self.form, *execution, **settings)

    def image(self, first: int) -> list[int]:
        """Token ids of some image."""
        codes = self.vocabulary.code_token_ids[(first + torch.arange(CODES).numpy() * 3) % 16]
        return [self.vocabulary.begin_image, *codes.tolist(), self.vocabulary.end_image]

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """transformers' own forward pass of one sequence, without a cache: [S, V]."""
        hidden = self.model.model(input_ids=torch.tensor([list(token_ids)])).last_hidden_state
        return self.model.lm_head(hidden)[0]


def answer_all(
    decoder: ContinuousDecoder,
    requests: Sequence[TokenRequest],
    joining: int | None = None,
    watch: Callable[[ContinuousDecoder], None] = lambda decoder: None,
) -> list[list[int]]:
    """The answers' tokens. ``joining`` requests come at each step; None adds all at once."""
    coming, answers = list(requests), {}
    while coming or decoder.usage().running + decoder.usage().waiting:
        for _ in range(min(len(coming), joining or len(coming))):
            answers[decoder.add(coming.pop(0))] = []
        for number, chunk in decoder.step():
            assert not isinstance(chunk, Exception), chunk
            answers[number] += chunk.token_ids
        watch(decoder)
    return list(answers.values())
