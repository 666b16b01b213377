"""Decode: draw the tokens of a batch of answers one by one.

    decoder = BatchDecoder(model, classes, codes_per_image, batch=1, options=GenerationOptions())
    for new_tokens in decoder.stream([[0, 40, 50]], [100], torch.Generator()):
        print(new_tokens[0])

A decoding step works on tensors of fixed shapes at fixed addresses. Drawing, guidance and the state
of the modalities run on the device together with the model, and the host only starts the steps. If
every answer is one image, no step for its codes has a condition (paper, section 2.4).

Letters in tensor names: B rows of the batch, R rows of all passes (``guidance.py``), C columns of
an answer, V vocabulary, H hidden size.
Source of the sampling rules and defaults: paper, section 2.4, and the reference inference code.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.inference.answers.answer import AnswerBatch
from megatron_chameleon.inference.engine.context import BatchContext
from megatron_chameleon.inference.engine.guidance import Guidance
from megatron_chameleon.inference.engine.modality import Force, ModalityState, TokenClasses
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions
from megatron_chameleon.inference.engine.row_settings import RowSettings
from megatron_chameleon.inference.engine.sampling import draw, forbid, penalise_repetition
from megatron_chameleon.parallel import cuda_graphs

RESERVED_TOKENS = 256
"""Columns reserved for an answer of unknown length. The buffers grow if it becomes longer."""

__all__ = ["BatchDecoder", "Execution", "GenerationOptions", "decode"]


class BatchDecoder:
    """Answers batches of one size, one after the other, and keeps its buffers and graphs.

    Args:
        model: ``ChameleonForConditionalGeneration``, in eval mode.
        classes: Token classes on the model's device.
        codes_per_image: Number of codes of one image.
        batch: Number of prompts in a batch.
        options: How to draw. The caller handles ``seed``, ``max_tokens`` and ``batch_size``.
        execution: How the steps run; None chooses what suits the device.
    """

    def __init__(
        self,
        model: Any,
        classes: TokenClasses,
        codes_per_image: int,
        batch: int,
        options: GenerationOptions,
        execution: Execution | None = None,
    ) -> None:
        self.batch, self.options, self._classes = batch, options, classes
        device = classes.code_V.device
        self.execution = execution or Execution.on(device.type)
        self._guidance = Guidance.of(options)
        self.context = BatchContext(
            model,
            batch * len(self._guidance.passes),
            self.execution.compiler,
            self._guidance.forgetful(batch, device),
        )
        self._settings = RowSettings.of([options] * batch, device)
        self._generator = torch.Generator(device)
        self._record = cuda_graphs.graph_recorder(self._generator)
        tokens_left_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._state = ModalityState(
            classes, codes_per_image, tokens_left_B, images=options.images, force=options.force
        )
        self._seen_BV = torch.zeros((batch, len(classes.code_V)), dtype=torch.bool, device=device)
        self._tokens_B = torch.zeros_like(tokens_left_B)
        self._visible_R = torch.zeros(self.context.rows, dtype=torch.bool, device=device)
        self._drawn_BC = torch.empty((batch, 0), dtype=torch.int64, device=device)
        self._count_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._image_tokens = codes_per_image + 2  # begin, codes, end
        self._code_head_VH = _rows_of(model.lm_head.weight, classes.code_token_ids)
        self._steps: dict[tuple[int, bool], Callable[[], None]] = {}

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        generator: torch.Generator,
        answers: AnswerBatch | None = None,
    ) -> Iterator[list[list[int]]]:
        """Answer prompts.

        Args:
            prompts: ``batch`` lists of token ids. Each starts with ``<s>``, and lengths may differ.
            max_new_tokens: The largest number of tokens of each answer, above 0.
            generator: A generator on the model's device.
            answers: New ones, which read the tokens and end a row in which a stop string appears.

        Yields:
            The new tokens of each answer, including ``</s>`` if it was drawn. They come whenever
            the host waits for the device (``Execution.sync_every_tokens``). Answers that are one
            image come as a whole.
        """
        assert len(prompts) == len(max_new_tokens) == self.batch
        assert self.options.force is not Force.IMAGE or min(max_new_tokens) >= self._image_tokens
        width, longest = max(map(len, prompts)), max(max_new_tokens)
        self._generator.set_state(generator.get_state())
        self._start(prompts, max_new_tokens)
        count, shown = 1, 0
        while True:
            if count == self._next_sync(shown, longest):
                columns_BC = self._drawn_BC[:, shown:count].tolist()
                shown = count
                new_tokens = [[token for token in row if token >= 0] for row in columns_BC]
                if answers is not None:
                    new_tokens, stopped = answers.take(new_tokens)
                    if stopped:
                        self._state.finished_B[stopped] = True
                finished = count >= longest or bool(self._state.finished_B.all())
                yield new_tokens
                if finished:
                    break
            self._step(width + count, self._within_image(count))
            count += 1
        generator.set_state(self._generator.get_state())

    def _start(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
        """Read the prompts and draw the first token."""
        classes, guidance, options = self._classes, self._guidance, self.options
        device = self._tokens_B.device
        passes = [
            [guidance.prompt(kind, prompt, classes) for prompt in prompts]
            for kind in guidance.passes
        ]
        if max(max_new_tokens) > self._drawn_BC.shape[1]:
            self._drawn_BC = self._drawn_BC.new_empty((self.batch, max(max_new_tokens)))
            self._steps.clear()
        self._state.restart(torch.tensor(max_new_tokens, device=device))
        self._count_1.zero_()
        self._seen_BV.zero_()
        for row, prompt in enumerate(prompts):
            self._seen_BV[row, torch.tensor(prompt, device=device)] = True
        self._seen_BV &= classes.text_V
        ahead = self._image_tokens if options.force is Force.IMAGE else RESERVED_TOKENS
        columns = max(map(len, prompts)) + min(ahead, max(max_new_tokens))
        if self.context.reserve(self.execution.width(columns)):
            self._steps.clear()
        self._draw(self.context.start(passes, classes.pad))

    def _next_sync(self, shown: int, longest: int) -> int:
        """The length of the longest answer at which the host waits for the device again."""
        if self.options.force is Force.IMAGE:
            return self._image_tokens
        return min(shown + self.execution.sync_every_tokens, longest)

    def _within_image(self, count: int) -> bool:
        """Whether token ``count`` is certain to be a code in every row."""
        forced = self.options.force is Force.IMAGE
        return forced and 1 <= count <= self._state.codes_per_image

    def _step(self, columns: int, within_image: bool) -> None:
        """Read the last tokens into the last of ``columns`` columns, and draw the next ones."""
        width = self.execution.width(columns)
        if self.context.widen(columns, width):
            self._steps.clear()  # the graphs hold the old buffers
        key = (width, within_image)
        if key not in self._steps:
            step = self._step_within_image if within_image else self._step_anywhere
            self._steps[key] = self._record(step) if self.execution.graph else step
        self._steps[key]()

    def _step_anywhere(self) -> None:
        self._draw(self._advance_context())

    def _step_within_image(self) -> None:
        self._draw_code(self._advance_context())

    def _advance_context(self) -> Tensor:
        passes = len(self._guidance.passes)
        return self.context.step(self._tokens_B.repeat(passes), self._visible_R)

    def _draw(self, last_RH: Tensor) -> None:
        """Draw a token for each row from the head's input, and update every state with it."""
        state, options = self._state, self.options
        logits_RV = self.context.logits(last_RH)
        logits_BV = logits_RV[: self.batch]
        if len(self._guidance.passes) > 1:
            mixed_BV = self._guidance.mix(logits_RV)
            logits_BV = torch.where(state.in_image_B[:, None], mixed_BV, logits_BV)
        logits_BV = penalise_repetition(logits_BV, self._seen_BV, options.repetition_penalty)
        forbid(logits_BV, self._classes.limits_KV, state.next_token())
        tokens_B = draw(logits_BV, self._settings, self._uniforms())
        active_B = ~state.finished_B
        self._keep(tokens_B.masked_fill(~active_B, -1))
        state.advance(tokens_B)
        if options.repetition_penalty != 1:
            tokens_B1 = tokens_B[:, None]
            seen_B1 = self._seen_BV.gather(1, tokens_B1) | self._classes.text_V[tokens_B1]
            self._seen_BV.scatter_(1, tokens_B1, seen_B1)
        self._tokens_B.copy_(tokens_B)
        self._visible_R.copy_(self._guidance.visible(active_B, tokens_B, state))

    def _draw_code(self, last_RH: Tensor) -> None:
        """``_draw`` for steps in which every row gets a code: only logits of codes are computed."""
        logits_RV = self.context.logits(last_RH, self._code_head_VH)
        logits_BV = self._guidance.mix(logits_RV)
        places_B = draw(logits_BV, self._settings, self._uniforms())
        tokens_B = self._classes.code_token_ids[places_B]
        self._keep(tokens_B)
        self._state.advance_codes()
        self._tokens_B.copy_(tokens_B)

    def _uniforms(self) -> Tensor:
        """A number in [0, 1) for each row: fp64 [B]."""
        return torch.rand(
            self.batch,
            generator=self._generator,
            dtype=torch.float64,
            device=self._generator.device,
        )

    def _keep(self, tokens_B: Tensor) -> None:
        """Store tokens, or -1 for finished rows, in the next column of the answers."""
        self._drawn_BC.index_copy_(1, self._count_1, tokens_B[:, None])
        self._count_1 += 1


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    classes: TokenClasses,
    codes_per_image: int,
    max_new_tokens: Sequence[int],
    options: GenerationOptions,
    generator: torch.Generator,
    execution: Execution | None = None,
) -> list[list[int]]:
    """Answer a batch of prompts. The arguments are those of ``BatchDecoder`` and its ``stream``.

    Returns:
        The answers' token ids, including ``</s>`` if it was drawn.
    """
    decoder = BatchDecoder(model, classes, codes_per_image, len(prompts), options, execution)
    return collect(decoder.stream(prompts, max_new_tokens, generator))


def collect(stream: Iterator[list[list[int]]]) -> list[list[int]]:
    """Join the parts of a stream to whole answers."""
    parts = list(stream)
    return [[token for part in row for token in part] for row in zip(*parts, strict=True)]


def _rows_of(weight_VH: Tensor, ids: Tensor) -> Tensor:
    """Rows of the head's weights; a view if the ids are consecutive, as the paper's are."""
    first, count = (int(ids[0]), len(ids)) if len(ids) else (0, 0)
    if count and int(ids[-1]) - first + 1 == count:
        return weight_VH[first : first + count]
    return weight_VH.index_select(0, ids)
