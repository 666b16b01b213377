"""Whoever answers: our engine, and transformers in two ways. All are in one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.serving.subjects import Subject
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.interface import TokenChunk, TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.tokenizer.common.image_form import ImageForm

GREEDY = GenerationOptions(temperature=0, repetition_penalty=1.0)
SAMPLED = GenerationOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.0)
Answers = list[list[int]]


@dataclass(frozen=True)
class Block:
    """What is asked: a text or an image each.

    Args:
        image: Whether it is an image.
        sampled: Whether tokens are drawn at random. Then ``</s>`` is forbidden, because texts of
            different lengths could not be compared; at temperature 0 they are the same.
    """

    image: bool
    sampled: bool = False

    @property
    def name(self) -> str:
        return "image" if self.image else "text, sampled" if self.sampled else "text"

    def options(self) -> GenerationOptions:
        force = Force.IMAGE if self.image else Force.TEXT
        return replace(SAMPLED if self.sampled else GREEDY, force=force)

    def tokens(self, subject: Subject) -> int:
        """The largest number of tokens of an answer."""
        return subject.codes_per_image + 2 if self.image else subject.text_tokens


class Ours:
    """Our engine. The decoder keeps its buffers from one call to the next, as a server does."""

    name = "ours"

    def __init__(self, subject: Subject, *, ends: bool = True, max_rows: int = 64) -> None:
        classes = subject.classes(ends)
        layers = TransformersLayers(subject.model, classes.code_token_ids)
        self.decoder = ContinuousDecoder(
            layers,
            classes,
            ImageForm(subject.vocabulary, subject.codes_per_image),
            max_rows=max_rows,
        )
        self._subject = subject

    def answer(self, prompts: Sequence[Sequence[int]], block: Block) -> Answers:
        """Answer prompts, all at once."""
        tokens, options = block.tokens(self._subject), block.options()
        return self.answer_all([TokenRequest(tuple(p), tokens, options) for p in prompts])

    def answer_all(self, requests: Sequence[TokenRequest]) -> Answers:
        """Answer requests that are all there."""
        numbers = [self.decoder.add(request) for request in requests]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while self.decoder.usage().running or self.decoder.usage().waiting:
            for number, chunk in self.decoder.step():
                assert isinstance(chunk, TokenChunk), chunk
                answers[number] += chunk.token_ids
        return [answers[number] for number in numbers]


class Generate:
    """transformers' ``generate`` on a batch. It cannot draw images: its model forbids codes."""

    name = "generate"

    def __init__(self, subject: Subject) -> None:
        self._model, self._subject = subject.model, subject

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], block: Block) -> Answers:
        """Answer prompts of one length."""
        tokens, options = block.tokens(self._subject), block.options()
        ids = torch.tensor(prompts)
        sampling: dict[str, Any] = {"do_sample": False}
        if block.sampled:
            sampling = {"do_sample": True, "top_k": 0, "min_new_tokens": tokens}
            sampling |= {"temperature": options.temperature, "top_p": options.top_p}
        found = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            **sampling,
        )
        rows = found[:, ids.shape[1] :].tolist()
        return [up_to_end(row, self._subject.vocabulary.eos) for row in rows]


class TransformersBatching:
    """transformers' continuous batching. Its thread and cache exist only while it answers."""

    name = "its batching"

    def __init__(self, subject: Subject, rows: int) -> None:
        self._model, self._subject, self._rows = subject.model, subject, rows

    def timed(
        self, prompts: Sequence[Sequence[int]], block: Block, clock: Callable[[], float]
    ) -> tuple[float, Answers]:
        """Answers, and the seconds without starting and stopping the manager."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        tokens, page = block.tokens(self._subject), 64
        blocks = (len(prompts[0]) + tokens) // page + 1
        generation = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=self._subject.vocabulary.eos,
            pad_token_id=self._subject.vocabulary.pad,
        )
        batching = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=2 * self._rows * blocks,
            max_batch_tokens=self._rows * len(prompts[0]),
            max_requests_per_batch=self._rows,
            allow_block_sharing=False,
        )
        try:
            with self._model.continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=batching, block=True
            ) as manager:
                begin = clock()
                numbers = manager.add_requests(
                    inputs=[list(prompt) for prompt in prompts], max_new_tokens=tokens
                )
                answers: dict[str, list[int]] = {}
                while len(answers) < len(prompts):
                    result = manager.get_result(timeout=60)
                    assert result is not None and result.error is None, result
                    if result.is_finished():
                        answers[result.request_id] = list(result.generated_tokens)
                seconds = clock() - begin
        finally:
            self._model.set_attn_implementation("sdpa")
        return seconds, [answers[number] for number in numbers]


def up_to_end(token_ids: list[int], eos: int) -> list[int]:
    """Without the padding after ``</s>``."""
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids
