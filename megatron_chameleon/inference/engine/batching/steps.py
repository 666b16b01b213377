"""What a step computes on the device: tokens in, the next tokens out.

The state of the answers is in tensors of fixed addresses, so a CUDA graph can replay a step, and
the host waits for the device only when it reads what was drawn.

Letters in tensor names: B answers, R rows (one or more of each answer), G key heads, V vocabulary,
H hidden size, K tokens of an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.batching.cache import Cache, Segment, Shelf, StepAttention
from megatron_chameleon.inference.engine.batching.rows import Answer, Row
from megatron_chameleon.inference.engine.cached_model import CachedModel
from megatron_chameleon.inference.engine.guidance import Conditioning, mix, visible
from megatron_chameleon.inference.engine.modality import NEVER_TOKENS, ModalityState, TokenClasses
from megatron_chameleon.inference.engine.options import Execution
from megatron_chameleon.inference.engine.row_settings import DrawKind, RowSettings
from megatron_chameleon.inference.engine.sampling import draw, forbid, penalise_repetition
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE, ImageForm

NOT_FINITE = -2
"""Stands for the token of an answer whose logits are not finite."""
NOTHING_DRAWN = -1
"""Stands for the token of an answer that is finished."""


FILLER = len(Conditioning)
"""The kind of a row that only fills up a bucket; it sees nothing."""

RowPlace = tuple[Row | None, int, int]
"""A row of a step, the number of its slot, and the columns of its shelf; None is a filler."""


@dataclass(frozen=True)
class DrawPlan:
    """How the next tokens are drawn.

    Args:
        codes_only: Whether every answer is certain to get a code.
        kind: What holds for all of their settings.
        mixed: Whether the rows of an answer may have to be combined.
    """

    codes_only: bool
    kind: DrawKind
    mixed: bool


@dataclass(frozen=True)
class StepPlan:
    """What is fixed for a step; steps of one plan can replay the same graph.

    Args:
        segments: The shelves of the rows.
        rows: Number of rows R, with those that only fill up a bucket.
        answers: Number of answers B, likewise.
        in_order: Whether row i is the only row of answer i, for all rows.
        guided: Whether an answer has several rows.
        draw: How the next tokens are drawn.
    """

    segments: tuple[Segment, ...]
    rows: int
    answers: int
    in_order: bool
    guided: bool
    draw: DrawPlan


class AnswerTensors:
    """The state of some neighbouring answers, as views of ``DeviceState``'s tensors.

    Args:
        state: All of it.
        places: Which answers.
        settings: How they are drawn.
    """

    def __init__(self, state: "DeviceState", places: slice, settings: RowSettings) -> None:
        self.settings = settings
        whole, real, truth = (x[:, places] for x in (state.whole_B, state.real_B, state.truth_B))
        self.token_B, self.count_B = whole[0], whole[1]
        """The newest token, and how many tokens there are."""
        self.modality = ModalityState(
            state.classes,
            state.form,
            tokens_left_B=whole[2],
            image_left_B=whole[3],
            finished_B=truth[0],
            in_text_B=whole[4],
            image_room_B=whole[5],
            only_image_B=truth[1],
            row_tokens_B=whole[6],
            grid_kind_B=whole[7],
        )
        self.scale_B, self.scale_image_B = real
        self.guided_B, self.row_3B = truth[2], whole[8:11]
        self.seen_BV, self.random_BK = state.seen_BV[places], state.random_BK[places]
        self.drawn_BS = state.drawn_BS[places]

    def random_numbers(self, kind: DrawKind) -> Tensor:
        """A number for each answer's next token: fp64 [B]."""
        if not (kind.free or kind.filtered):
            return self.random_BK[:, 0]  # nobody uses them
        # finished answers go on counting until the host sees them
        number_B1 = self.count_B.clamp(max=self.random_BK.shape[1] - 1)[:, None]
        return self.random_BK.gather(1, number_B1)[:, 0]


class DeviceState:
    """The tensors of the answers and rows that grow, and the computations on them.

    Args:
        model: The model.
        classes: Token classes on the model's device.
        form: The form of an image.
        sync_every_tokens: How many tokens of each answer are kept until the host reads them.

    Attributes:
        moves: How often tensors have moved to other addresses.
    """

    def __init__(
        self,
        model: CachedModel,
        classes: TokenClasses,
        form: ImageForm,
        sync_every_tokens: int,
    ) -> None:
        self.model, self.classes, self.form = model, classes, form
        self._sync_every_tokens, self.moves = sync_every_tokens, 0
        self._answers = self._rows = 0
        self._settings: dict[int, RowSettings] = {}
        self.seen_BV = torch.empty((0, len(classes.code_V)), dtype=torch.bool)
        self.random_BK = torch.empty((0, 0), dtype=torch.float64)
        self._drawn_1 = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.reserve(1, 1, 1)

    def reserve(self, answers: int, rows: int, tokens: int) -> None:
        """Make room for answers of up to so many tokens.

        What ``load`` wrote is lost if the tensors move.
        """
        longest = self.random_BK.shape[1]
        if answers <= self._answers and rows <= self._rows and tokens <= longest:
            return
        if answers > self._answers:
            self._answers = max(answers, 2 * self._answers)
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
        count, device = self._answers, self.model.device
        seen_BV, random_BK = self.seen_BV, self.random_BK
        self.seen_BV = torch.zeros((count, seen_BV.shape[1]), dtype=torch.bool, device=device)
        self.seen_BV[: len(seen_BV)] = seen_BV
        self.random_BK = torch.zeros(
            (count, max(tokens, longest)), dtype=torch.float64, device=device
        )
        self.random_BK[: len(random_BK), :longest] = random_BK

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.whole_B = whole(11, count)
        self.real_B = torch.ones((2, count), device=device)
        self.truth_B = torch.zeros((3, count), dtype=torch.bool, device=device)
        self.drawn_BS = whole(count, self._sync_every_tokens)
        self._whole_R = whole(4, self._rows)
        self._column_RG = whole(self._rows, self.model.num_key_heads)
        self.moves += 1

    def admit(self, answer: Answer) -> None:
        """Fill the large tensors of an answer that has just got its place."""
        self.random_BK[answer.place, : answer.max_new_tokens] = answer.random_numbers()
        if answer.options.repetition_penalty != 1:
            seen_V = self.seen_BV[answer.place]
            seen_V.zero_()
            token_ids = [*answer.request.prompt, *answer.token_ids]
            seen_V[torch.tensor(token_ids, device=self.model.device)] = True
            seen_V &= self.classes.text_V

    def move(self, source: int, target: int) -> None:
        """Copy the large tensors of an answer to another place."""
        self.random_BK[target] = self.random_BK[source]
        self.seen_BV[target] = self.seen_BV[source]

    def load(self, answers: Sequence[Answer], number_of: Mapping[Row, int]) -> None:
        """Write what the host knows of answers that lie at neighbouring places.

        Args:
            answers: In the order of their places.
            number_of: The number of each row among those whose logits are computed.
        """
        whole, real, truth = [], [], []
        for answer in answers:
            guidance, rules = answer.guidance, answer.rules
            count = len(answer.token_ids)
            newest = answer.token_ids[-1] if count else self.classes.pad
            left = (answer.tokens_left, answer.image_place.left)
            in_text = (int(rules.in_text), rules.image_room)
            grid = (answer.image_place.row_tokens, rules.grid_kind)
            passes = (number_of[answer.rows[number]] for number in guidance.mixed_passes)
            whole.append((newest, count, *left, *in_text, *grid, *passes))
            real.append((guidance.scale, guidance.scale_image))
            truth.append((False, rules.only_image, len(answer.rows) > 1))
        places = slice(answers[0].place, answers[0].place + len(answers))
        self.whole_B[:, places] = torch.tensor(whole).T
        self.real_B[:, places] = torch.tensor(real).T
        self.truth_B[:, places] = torch.tensor(truth).T
        # what fills up a bucket is finished, and refers to a row that exists
        self.truth_B[0, places.stop :] = True
        self.whole_B[8:, places.stop :] = 0
        self.whole_B[6, places.stop :] = OUTSIDE.row_tokens

    def load_rows(self, places: Sequence[RowPlace]) -> None:
        """Write what the host knows of all rows of a step, in the order of the step."""
        whole, heads = [], self.model.num_key_heads
        for row, slot, columns in places:
            first = slot * heads * columns
            if row is None:
                whole.append((0, 0, 0, FILLER, first, columns))
            else:
                state = (row.answer.place, row.length, row.start, int(row.kind))
                whole.append((*state, first, columns))
        whole_R = torch.tensor(whole).T
        self._whole_R[:, : len(places)] = whole_R[:4]
        column_RG = whole_R[4, :, None] + torch.arange(heads) * whole_R[5, :, None]
        self._column_RG[: len(places)] = column_RG

    def view(self, places: slice, answers: Sequence[Answer]) -> AnswerTensors:
        """The state of the answers at some neighbouring places, of which the last may be empty."""
        count = places.stop - places.start
        if count not in self._settings:  # each number of answers keeps its tensors for its graphs
            self._settings[count] = RowSettings(count, self.model.device)
        settings = self._settings[count]
        settings.set_all([answer.options for answer in answers])
        return AnswerTensors(self, places, settings)

    def rewind(self) -> None:
        """Forget which tokens the host has read."""
        self._drawn_1.zero_()

    def step(self, plan: StepPlan, answers: AnswerTensors) -> None:
        """Read the newest token of each answer, and draw the next one."""
        answer_R, length_R, start_R, kind_R = self._whole_R[:, : plan.rows]
        finished_B, in_image_B = answers.modality.finished_B, answers.modality.in_image_B
        if plan.in_order:
            token_R, sees_R = answers.token_B, ~finished_B
        else:
            token_R = answers.token_B.index_select(0, answer_R)
            sees_R = (kind_R != FILLER) & ~finished_B.index_select(0, answer_R)
        if plan.guided:
            in_image_R = in_image_B.index_select(0, answer_R)
            sees_R &= visible(kind_R, token_R, in_image_R, self.classes.image_V)
            forgets_R = (kind_R == Conditioning.NOTHING) & ~sees_R
            length_R.copy_(torch.where(forgets_R, start_R, length_R))
        column_RG = self._column_RG[: plan.rows] + length_R[:, None]
        attend = StepAttention(plan.segments, column_RG, length_R, self.model.dtype)
        last_RH = self.model.hidden(
            token_R[:, None], length_R[:, None], torch.zeros_like(length_R), attend
        )
        length_R += sees_R
        if not (plan.in_order or plan.draw.mixed):
            last_RH = last_RH.index_select(0, answers.row_3B[0])
        self.draw(last_RH, answers, plan.draw)

    def draw(self, last_RH: Tensor, answers: AnswerTensors, plan: DrawPlan) -> None:
        """Draw a token for each answer, and update its state with it.

        Args:
            last_RH: The head's input of each row; if no answer is mixed, of its first row.
            answers: The answers.
            plan: What holds for all of them.
        """
        classes, modality = self.classes, answers.modality
        logits_BV = self.model.logits(last_RH, plan.codes_only)
        if plan.mixed:
            mixed_BV = mix(logits_BV, answers.row_3B, answers.scale_B, answers.scale_image_B)
            mixes_B = answers.guided_B & modality.in_image_B
            full_BV = logits_BV.index_select(0, answers.row_3B[0])
            logits_BV = torch.where(mixes_B[:, None], mixed_BV, full_BV)
        broken_B = ~logits_BV.amax(dim=-1).isfinite()
        if not plan.codes_only:
            if plan.kind.penalised:
                penalise_repetition(logits_BV, answers.seen_BV, answers.settings.penalty_B)
            forbid(logits_BV, classes.limits_KV, modality.next_token())
        token_B = draw(logits_BV, answers.settings, answers.random_numbers(plan.kind))
        if plan.codes_only:
            token_B = classes.code_token_ids[token_B]
        drawn_B = token_B.masked_fill(broken_B, NOT_FINITE)
        drawn_B.masked_fill_(modality.finished_B, NOTHING_DRAWN)
        answers.drawn_BS.index_copy_(1, self._drawn_1, drawn_B[:, None])
        self._drawn_1 += 1
        if plan.codes_only:
            modality.advance_codes()
        else:
            modality.advance(token_B)
            if plan.kind.penalised:
                token_B1 = token_B[:, None]
                seen_B1 = answers.seen_BV.gather(1, token_B1) | classes.text_V[token_B1]
                answers.seen_BV.scatter_(1, token_B1, seen_B1)
        modality.finished_B.logical_or_(broken_B)
        answers.token_B.copy_(token_B)
        answers.count_B.add_(1)


class Layout:
    """Which rows a step computes, as long as none leaves, joins or moves.

    Making one writes what the host knows to the device.

    Args:
        state: The device's state.
        cache: Where the rows lie.
        running: The answers, in the order of their places; at least one.
        execution: How steps run.
    """

    def __init__(
        self, state: DeviceState, cache: Cache, running: Sequence[Answer], execution: Execution
    ) -> None:
        self._execution = execution
        self._parts: list[tuple[Shelf, int, int]] = []
        places: list[RowPlace] = []
        for shelf in cache.shelves:
            if not shelf.slots:
                continue
            rows = min(execution.bucket(len(shelf.slots)), shelf.capacity)
            self._parts.append((shelf, len(places), rows))
            owners = [*(slot.owner for slot in shelf.slots), *[None] * (rows - len(shelf.slots))]
            places += [(row, slot, shelf.columns) for slot, row in enumerate(owners)]
        number_of = {row: number for number, (row, _, _) in enumerate(places) if row is not None}
        self.rows, self.guided = len(places), len(number_of) > len(running)
        in_order = all(number_of[answer.rows[0]] == answer.place for answer in running)
        self.in_order = in_order and not self.guided and len(self._parts) == 1
        self.answers = self.rows if self.in_order else execution.bucket(len(running))
        state.reserve(self.answers, self.rows, 1)
        state.load(running, number_of)
        state.load_rows(places)
        self.view = state.view(slice(0, self.answers), running)
        self._lengths = self._measured()
        self.room = min(
            (row.room for row in number_of),
            default=NEVER_TOKENS,
        )
        """How many steps all rows have room for on their shelves."""

    def advance(self, steps: int) -> None:
        """Note that steps were run, and that no answer has ended."""
        self.room -= steps
        if self.guided:  # rows that see only a part of their answer
            self._lengths = self._measured()
        else:
            self._lengths = [(low + steps, high + steps) for low, high in self._lengths]

    def _measured(self) -> list[tuple[int, int]]:
        """The smallest and the largest number of columns that rows of each shelf have now."""
        found = []
        for shelf, _, _ in self._parts:
            lengths = [slot.owner.length for slot in shelf.slots]
            found.append((min(lengths), max(lengths)))
        return found

    def segments(self, number: int, many: bool) -> tuple[Segment, ...]:
        """The segments of a step.

        Args:
            number: How many steps came since the last ``advance``.
            many: Whether more than one step runs until the host knows the lengths again.
        """
        segments = []
        for (shelf, first, rows), (shortest, longest) in zip(
            self._parts, self._lengths, strict=True
        ):
            columns = longest + number + 1
            width = min(self._execution.width(columns), shelf.columns)
            # rows that see only a part of their answer have lengths that are not known
            equal = shortest == longest and not (self.guided and many)
            masked = not equal or self._execution.width_step > 1
            segments.append(Segment(shelf, first, rows, width, masked))
        return tuple(segments)
