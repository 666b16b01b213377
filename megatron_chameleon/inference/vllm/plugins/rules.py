"""The modality rules, guidance and sampling for vLLM's two model runners, which hand over logits.

V1 runs on CPUs, and V2 where there is Triton. Their interfaces differ: V1 shares the lists of
tokens of its rows with us, and V2 has them on the device, where the host does not know the last
ones. ``processor.py`` makes a class for both out of this one.

Guidance: the passes of an image are requests of their own with the same ``group``. Where all of
them stand in the same step at the same place of the image, their logits are mixed, and all get the
same code. Where they do not, because one joined later or was preempted, all get ``<pad>``, which
ends them, and the engine submits them again with what they have. vLLM's prefix cache makes that
cheap.

Letters in tensor names: R rows, V vocabulary, L the last tokens of a row, K kinds of next tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.modality import (
    AnswerRules,
    ModalityState,
    TokenClasses,
)
from megatron_chameleon.inference.engine.row_settings import RowSettings
from megatron_chameleon.inference.engine.sampling import (
    draw,
    forbid,
    penalise_repetition,
    uniforms,
)
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from megatron_chameleon.tokenizer.common.image_form import (
    GRID_DUE,
    OUTSIDE,
    ImageForm,
    ImagePlace,
)


@dataclass
class Row:
    """A request in vLLM's batch.

    Attributes:
        request: What it asks for.
        room: The largest number of its tokens behind its prompt.
        prompt_tokens: Length of its prompt.
        tokens: Prompt and answer (V1 only).
        answer: The answer, which vLLM extends (V1 only).
        image_place: Where in an image its last token is (V1 only).
        seen_V: The text tokens that it has, if they are penalised (V1 only).
    """

    request: RowRequest
    room: int
    prompt_tokens: int
    answer: list[int] = field(default_factory=list)
    read: int = 0
    image_place: ImagePlace = OUTSIDE
    seen_V: Tensor | None = None


@dataclass
class _Step:
    """The rows of a step, from either runner.

    Attributes:
        rows: The R rows.
        places_R: int64, where they are in ``Rules.rows``.
        answered: The number of tokens that vLLM has drawn in each row. V2 also hands over rows
            whose prompt is not read to its end, and ignores their tokens; there it is too small,
            so that such a row never stands where the other passes of its image do.
        image_2R: int64, ``ImagePlace.left`` and ``row_tokens`` of each row.
        seen_RV: bool, the text tokens that are penalised; None if no row has a penalty.
    """

    rows: list[Row]
    places_R: Tensor
    answered: list[int]
    image_2R: Tensor
    seen_RV: Tensor | None


class Rules:
    """Leaves one token in each row of logits.

    Args:
        classes: Token classes on the device of the logits.
        form: The form of an image.
        context_tokens: The largest number of tokens of a row.
        places: The largest number of rows.
    """

    def __init__(
        self, classes: TokenClasses, form: ImageForm, context_tokens: int, places: int
    ) -> None:
        self.classes, self.form = classes, form
        self.context_tokens = context_tokens
        self.device = classes.code_V.device
        self.rows: dict[int, Row] = {}
        """By place in the batch (V1), or by slot (V2)."""
        self._settings = RowSettings(places, self.device)

    def put(self, place: int, row: Row | None) -> None:
        """A place, or slot, has another row, or none."""
        if row is None:
            self.rows.pop(place, None)
        else:
            self.rows[place] = row
        self._settings.set(place, None if row is None else row.request.options)

    def row(self, params: Any, prompt_tokens: int) -> Row:
        """A row for vLLM's ``SamplingParams``."""
        room = self.context_tokens - prompt_tokens
        if params.max_tokens is not None:
            room = min(room, params.max_tokens)
        return Row(RowRequest.of(params.extra_args), room, prompt_tokens)

    # V1

    def update_rows(self, update: Any) -> None:
        """Follow vLLM's batch: a ``BatchUpdate``, or None if its rows stay."""
        if update is None:
            return
        for place in update.removed:
            self.put(place, None)
        for place, params, prompt, answer in update.added:
            row = self.row(params, len(prompt))
            row.answer = answer
            if row.request.options.repetition_penalty != 1:
                row.seen_V = torch.zeros_like(self.classes.text_V)
            self._read(row, prompt)
            self.put(place, row)
        for source, target, direction in update.moved:
            moved, other = self.rows.get(source), self.rows.get(target)
            self.put(target, moved)
            self.put(source, other if direction.name == "SWAP" else None)

    def apply_v1(self, logits_RV: Tensor) -> Tensor:
        """Change fp32 [R, V] in place."""
        rows = [self.rows[place] for place in range(len(logits_RV))]
        for row in rows:
            self._read(row, row.answer[row.read :])
            row.read = len(row.answer)
        image_2R = self._tensor([row.image_place for row in rows]).T
        seen_RV = None
        if any(row.seen_V is not None for row in rows):
            nothing_V = torch.zeros_like(self.classes.text_V)
            seen_RV = torch.stack([nothing_V if r.seen_V is None else r.seen_V for r in rows])
        answered = [len(row.answer) for row in rows]
        places_R = torch.arange(len(rows), device=self.device)
        step = _Step(rows, places_R, answered, image_2R, seen_RV)
        return self._apply(logits_RV, step)

    def _read(self, row: Row, tokens: Sequence[int]) -> None:
        for token in tokens:
            row.image_place = self.form.after(row.image_place, token)
        if row.seen_V is not None and tokens:
            ids = torch.tensor(tokens, device=self.device)
            row.seen_V[ids] = self.classes.text_V[ids]

    # V2

    def apply_v2(self, logits_RV: Tensor, context: Any, states: Any) -> Tensor:
        """Change fp32 [R, V] in place.

        Args:
            logits_RV: One row per request, because there is no speculative decoding.
            context: vLLM's ``LogitsContext``.
            states: vLLM's ``LogitsProcRequestState``.
        """
        slots = context.idx_mapping_np.tolist()
        rows = [self.rows[slot] for slot in slots]
        lengths = context.seq_lens_upper_bound_np.tolist()  # exact without speculative decoding
        length_R1 = context.pos[:, None].long() + 1
        tokens = states.all_token_ids.gpu
        slots_R1 = context.idx_mapping[:, None].long()
        image_2R = self._image_places(tokens, slots_R1, length_R1)
        seen_RV = None
        if any(row.request.options.repetition_penalty != 1 for row in rows):
            at_L = torch.arange(max(lengths), device=self.device)
            last_RL = tokens[slots_R1, torch.minimum(at_L, length_R1 - 1)].long()
            seen_RV = torch.zeros_like(logits_RV, dtype=torch.bool).scatter_(1, last_RL, True)
            seen_RV &= self.classes.text_V
        answered = [n - row.prompt_tokens for n, row in zip(lengths, rows, strict=True)]
        step = _Step(rows, context.idx_mapping.long(), answered, image_2R, seen_RV)
        return self._apply(logits_RV, step)

    def _image_places(self, tokens: Tensor, slots_R1: Tensor, length_R1: Tensor) -> Tensor:
        """``ImagePlace`` of each row, from its last tokens: int64 [2, R]."""
        # inside an image if its beginning is among the last tokens, as many as an image can have
        # without its end
        back_L = torch.arange(self.form.longest - 1, device=self.device)
        at_RL = length_R1 - 1 - back_L
        last_RL = tokens[slots_R1, at_RL.clamp(min=0)].long()
        begins_RL = (last_RL == self.classes.begin_image) & (at_RL >= 0)
        back_R = begins_RL.int().argmax(1)
        left_R = self.form.begun.left - back_R
        row_tokens_R = torch.full_like(left_R, OUTSIDE.row_tokens)
        if self.form.grids:
            grid_R = last_RL.gather(1, (back_R - 1).clamp(min=0)[:, None])[:, 0]
            body_R = self.classes.body_V[grid_R] - (back_R - 1)
            left_R = torch.where(back_R == 0, GRID_DUE, body_R.clamp(min=-1))
            row_tokens_R = torch.where(body_R >= 0, self.classes.row_tokens_V[grid_R], row_tokens_R)
        left_R = torch.where(begins_RL.any(1), left_R, OUTSIDE.left)
        return torch.stack((left_R, row_tokens_R.clamp_(min=1)))

    # both

    def _apply(self, logits_RV: Tensor, step: _Step) -> Tensor:
        """Draw the next token of each row: fp32 [R, V], changed in place."""
        rows = step.rows
        requests = [row.request for row in rows]
        counts = [request.drawn + n for request, n in zip(requests, step.answered, strict=True)]
        whole, broken = self._groups(requests, counts)
        for group in whole:
            # the answer's row gets the mixed logits
            logits_RV[group[0]] = requests[group[0]].guidance.mix(logits_RV[group])[0]
        settings = self._settings.take(step.places_R)
        if step.seen_RV is not None:
            logits_RV = penalise_repetition(logits_RV, step.seen_RV, settings.penalty_B)
        rooms = [row.room - n for row, n in zip(rows, step.answered, strict=True)]
        next_R = self._next_tokens(requests, step.image_2R, self._tensor(rooms))
        logits_RV = forbid(logits_RV, self.classes.limits_KV, next_R)
        seeds_R = self._tensor([request.options.seed for request in requests])
        tokens_R = draw(logits_RV, settings, uniforms(seeds_R, self._tensor(counts)))
        for group in whole:
            tokens_R[group[1:]] = tokens_R[group[0]].clone()
        if broken:
            tokens_R[broken] = self.classes.pad
        return logits_RV.fill_(-torch.inf).scatter_(1, tokens_R[:, None], 0.0)

    def _groups(
        self, requests: Sequence[RowRequest], counts: Sequence[int]
    ) -> tuple[list[list[int]], list[int]]:
        """The rows of each whole group in the order of their passes, and those of broken groups."""
        members: dict[str, dict[int, int]] = {}
        for number, request in enumerate(requests):
            if request.group:
                members.setdefault(request.group, {})[request.part] = number
        whole, broken = [], []
        for parts in members.values():
            numbers = [parts[part] for part in sorted(parts)]
            complete = len(numbers) == requests[numbers[0]].parts
            together = len({counts[number] for number in numbers}) == 1
            if complete and together:
                whole.append(numbers)
            else:
                broken += numbers
        return whole, broken

    def _next_tokens(
        self, requests: Sequence[RowRequest], image_2R: Tensor, room_R: Tensor
    ) -> Tensor:
        """``NextToken`` of each row: int64 [R]."""
        asked = [request.options for request in requests]
        rules = [AnswerRules.of(self.form, o.images, o.force, o.size) for o in asked]
        return ModalityState(
            self.classes,
            self.form,
            tokens_left_B=room_R,
            image_left_B=image_2R[0],
            finished_B=torch.zeros_like(room_R, dtype=torch.bool),
            in_text_B=self._tensor([int(rule.in_text) for rule in rules]),
            image_room_B=self._tensor([rule.image_room for rule in rules]),
            only_image_B=self._tensor([rule.only_image for rule in rules]),
            row_tokens_B=image_2R[1],
            grid_kind_B=self._tensor([rule.grid_kind for rule in rules]),
        ).next_token()

    def _tensor(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, device=self.device)
