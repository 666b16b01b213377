"""Continuous batching: answers of all kinds grow together, and leave and join between two steps.

    decoder = ContinuousDecoder(model, classes, ImageForm(vocabulary, codes))
    number = decoder.add(TokenRequest((0, 40, 50), 100, GenerationOptions()))
    while decoder.usage().running + decoder.usage().waiting:
        for number, chunk in decoder.step():
            print(number, chunk.token_ids)

Nothing here waits, uses a clock or draws a number of its own: the same calls in the same order give
the same tokens, so the ranks of a tensor-parallel model can do it side by side.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.inference.engine.batching.cache import (
    Cache,
    PromptAttention,
    bytes_per_token,
    default_cache_tokens,
)
from megatron_chameleon.inference.engine.batching.requests import Event, News, check_tokens
from megatron_chameleon.inference.engine.batching.rows import Answer, Row
from megatron_chameleon.inference.engine.batching.steps import (
    NOT_FINITE,
    NOTHING_DRAWN,
    AnswerTensors,
    DeviceState,
    DrawPlan,
    Layout,
    StepPlan,
)
from megatron_chameleon.inference.engine.cached_model import CachedModel
from megatron_chameleon.inference.engine.interface import (
    EngineUsage,
    TokenRequest,
)
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.engine.options import Execution
from megatron_chameleon.parallel import cuda_graphs
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.wording import format_bytes

PROMPT_TOKENS = 16_384
"""Tokens of a pass over prompts, including padding. One row may have more."""
MAX_ROWS = 64


class ContinuousDecoder:
    """Answers many requests at once.

    A request waits until its prompt fits in the cache, and all wait in the order in which they
    came. An answer that grows beyond the room on its shelf moves to a wider one. If the budget has
    no room for that, the answer that came last gives up its rows. It waits in front of all others,
    and is read again, with the tokens that it has, when another answer has ended. So the oldest
    answer always grows, and every answer ends.

    Args:
        model: The layers.
        classes: Token classes on the model's device.
        form: The form of an image.
        execution: How the steps run; None chooses what suits the device.
        cache_tokens: The largest number of tokens whose keys and values are kept; None takes a
            share of the device's memory.
        max_rows: The largest number of rows of a step. A request has one, or two or three with
            guidance. It may be changed between two steps.
    """

    def __init__(
        self,
        model: CachedModel,
        classes: TokenClasses,
        form: ImageForm,
        execution: Execution | None = None,
        *,
        cache_tokens: int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self._model, self._classes, self._form = model, classes, form
        self.execution = execution or Execution.on(model.device.type)
        self.cache_tokens = cache_tokens or default_cache_tokens(model)
        self.max_rows = max_rows
        self.context_tokens: int = model.context_tokens
        self.device: torch.device = model.device
        self._waiting: deque[Answer] = deque()
        self._numbers = 0
        self._record = cuda_graphs.graph_recorder()
        self._set_up()

    def _set_up(self) -> None:
        """An empty cache, and no answer that grows."""
        self._cache = Cache(self._model, self.cache_tokens)
        self._state = DeviceState(
            self._model, self._classes, self._form, self.execution.sync_every_tokens
        )
        self._running: list[Answer] = []
        """In the order of their places."""
        self._held = False
        """Whether an answer had to give up its rows, and none has ended since."""
        self._joining: Answer | None = None
        self._layout: Layout | None = None
        self._graphs: dict[StepPlan, Callable[[], None]] = {}
        self._graphs_of = (-1, -1)

    def limit_cache(self, size: int) -> None:
        """Keep keys and values within so many bytes on this rank; only while nothing is answered.

        Raises:
            ConfigError: They would hold less than the shortest row needs.
        """
        assert not self._running, "rows would lose their keys and values"
        tokens, shortest = size // bytes_per_token(self._model), self._cache.shelves[0].columns
        if tokens < shortest:
            least = format_bytes(shortest * bytes_per_token(self._model))
            what = f"{format_bytes(size)} hold {tokens:,} tokens, too few for any answer"
            raise ConfigError("memory for keys and values", what, f"Give it {least} or more")
        self.cache_tokens = tokens
        self._set_up()

    def check(self, request: TokenRequest) -> None:
        """Refuse a request that could not be answered even if it were the only one.

        Raises:
            ConfigError: An option is out of range.
            DataError: The request does not fit the context or the cache.
        """
        request.options.check()
        answer = Answer(0, request, self._classes, self._form)
        check_tokens(answer, self.context_tokens)
        if len(answer.rows) > self.max_rows:
            raise DataError(
                "guidance",
                f"it takes {len(answer.rows)} rows, and at most {self.max_rows} are computed",
                "Allow more rows, or ask without guidance",
            )
        self._cache.check([row.longest for row in answer.rows])

    def add(self, request: TokenRequest) -> int:
        """Take a request.

        Returns:
            Its id.

        Raises:
            ChameleonError: As ``check``.
        """
        self.check(request)
        self._numbers += 1
        self._waiting.append(Answer(self._numbers, request, self._classes, self._form))
        return self._numbers

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """End an answer. Nothing comes for it any more; one that has ended is ignored."""
        for answer in [answer for answer in self._waiting if answer.number == number]:
            self._waiting.remove(answer)
        for answer in [answer for answer in self._running if answer.number == number]:
            self._release(answer)

    def abandon(self) -> list[int]:
        """Give up all answers that grow, with all memory, after an error in ``step``.

        Returns:
            Their ids, and that of a request that was about to join. Those that wait are still
            answered.
        """
        lost = [answer.number for answer in self._running]
        if self._joining is not None:
            lost.append(self._joining.number)
            self._waiting.remove(self._joining)
        self._set_up()
        return lost

    def usage(self) -> EngineUsage:
        """The load at this moment."""
        return EngineUsage(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens_used=self._cache.reserved_tokens,
            cache_tokens_total=self._cache.budget_tokens,
        )

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let waiting requests join, and draw the next tokens of all answers.

        Returns:
            The new tokens of each answer that got any, with the reason if it has ended; and an
            error in place of the rest of an answer whose logits are not finite.
        """
        news = News()
        if joined := self._join():
            self._keep(joined, self._read(joined), news)
        if self._running:
            steps = self._make_room()
            answers = list(self._running)
            self._keep(answers, self._draw(steps), news)
            if self._layout is not None:
                self._layout.advance(steps)
        return news.events()

    # -- joining and leaving

    def _join(self) -> list[Answer]:
        """Give waiting requests their places and slots, as long as there is room."""
        joined: list[Answer] = []
        first_of = {shelf: len(shelf.slots) for shelf in self._cache.shelves}
        rows = sum(len(answer.rows) for answer in self._running)
        self._held &= bool(self._running)
        while self._waiting and not self._held:
            self._joining = answer = self._waiting[0]
            rows += len(answer.rows)
            if rows > self.max_rows or not self._take_slots(answer):
                break
            joined.append(self._waiting.popleft())
            self._running.append(answer)
        self._joining = None
        if not joined:
            return []
        self._cache.sort_newest(first_of, key=lambda row: row.tokens)
        joined.sort(key=lambda answer: _place_in_cache(answer.rows[0]))
        first = len(self._running) - len(joined)
        self._running[first:] = joined
        longest = max(answer.max_new_tokens for answer in joined)
        self._state.reserve(self.execution.bucket(len(self._running)), 1, longest)
        for place, answer in enumerate(joined, first):
            answer.place = place
            self._state.admit(answer)
        self._layout = None
        return joined

    def _take_slots(self, answer: Answer) -> bool:
        """Take slots for all rows of an answer, or for none."""
        whole = self._cache.must_begin_whole([row.longest for row in answer.rows])
        for row in answer.rows:
            row.slot = self._cache.take(row.longest if whole else row.tokens + 1, row)
            if row.slot is None:
                for taken in answer.rows:
                    if taken.slot is not None:
                        self._cache.give_back(taken.slot)
                        taken.slot = None
                return False
        return True

    def _release(self, answer: Answer) -> None:
        """Free the slots and the place of an answer."""
        for row in answer.rows:
            assert row.slot is not None
            self._cache.give_back(row.slot)
            row.slot = None
        last = self._running.pop()
        if last is not answer:
            self._state.move(last.place, answer.place)
            last.place = answer.place
            self._running[last.place] = last
        answer.place = -1
        self._layout, self._held = None, False

    def _read(self, joined: Sequence[Answer]) -> Tensor:
        """Read the prompts of answers, and what they already have, and draw their next tokens."""
        rows = sorted((row for answer in joined for row in answer.rows), key=_place_in_cache)
        hidden = [self._read_together(batch) for batch in _batches(rows)]
        state, number_of = self._state, {row: number for number, row in enumerate(rows)}
        state.load(joined, number_of)
        places = slice(joined[0].place, joined[0].place + len(joined))
        view = state.view(places, joined)
        mixed = any(_in_guided_image(answer) for answer in joined)
        plan = DrawPlan(False, view.settings.kind, mixed)
        last_RH = torch.cat(hidden)
        if not plan.mixed:
            last_RH = last_RH.index_select(0, view.row_3B[0])
        state.rewind()
        state.draw(last_RH, view, plan)
        return view.drawn_BS[:, :1]

    def _read_together(self, rows: Sequence[Row]) -> Tensor:
        """Read rows in neighbouring slots in one pass; the head's input [R, H]."""
        seen, device = [row.seen() for row in rows], self._model.device
        width = max(map(len, seen))
        padded = [[*ids, *[self._classes.pad] * (width - len(ids))] for ids in seen]
        positions_RS = torch.arange(width, device=device).expand(len(rows), width)
        last_R = torch.tensor([len(ids) - 1 for ids in seen], device=device)
        slot = rows[0].slot
        assert slot is not None
        attend = PromptAttention(slot.shelf, slice(slot.number, slot.number + len(rows)))
        token_ids_RS = torch.tensor(padded, device=device)
        return self._model.hidden(token_ids_RS, positions_RS, last_R, attend)

    # -- growing

    def _make_room(self) -> int:
        """Make sure that all rows have room until the host reads the next tokens.

        Returns:
            How many steps it takes until then.
        """
        steps = self._steps()
        if self._layout is not None and self._layout.room >= steps:
            return steps
        for answer in sorted(self._running, key=lambda answer: answer.number):
            for row in answer.rows if answer.place >= 0 else ():
                while answer.place >= 0 and not self._widen(row, row.length + steps):
                    self._give_way(max(self._running, key=lambda answer: answer.number))
        self._layout = None
        return self._steps()

    def _steps(self) -> int:
        if self.execution.sync_every_tokens == 1 or not self._running:
            return 1
        longest = max(answer.tokens_left for answer in self._running)
        return min(self.execution.sync_every_tokens, longest)

    def _widen(self, row: Row, length: int) -> bool:
        """Move a row to a wider shelf if it needs one; False if the budget has no room."""
        slot, length = row.slot, min(length, row.longest)
        assert slot is not None
        if length <= slot.shelf.columns:
            return True
        wider = self._cache.move(slot, length)
        if wider is None:
            return False
        row.slot, self._layout = wider, None
        return True

    def _give_way(self, answer: Answer) -> None:
        """Take the rows from an answer, and let it wait in front of all others."""
        self._release(answer)
        self._waiting.appendleft(answer)
        self._held = True

    def _draw(self, steps: int) -> Tensor:
        """Run steps; the tokens of each answer [B, steps]."""
        if self._layout is None:
            self._layout = Layout(self._state, self._cache, self._running, self.execution)
        layout, state = self._layout, self._state
        codes = min(answer.image_place.certain_codes for answer in self._running)
        mixed = any(
            len(answer.rows) > 1 and (steps > 1 or answer.image_place.is_inside)
            for answer in self._running
        )
        plans = {
            codes_only: DrawPlan(codes_only, layout.view.settings.kind, mixed)
            for codes_only in {codes > 0, codes > steps - 1}
        }
        state.rewind()
        for number in range(steps):
            segments = layout.segments(number, many=steps > 1)
            sizes = (layout.rows, layout.answers, layout.in_order, layout.guided)
            self._run(StepPlan(segments, *sizes, plans[number < codes]), layout.view)
        return layout.view.drawn_BS[: len(self._running), :steps]

    def _run(self, plan: StepPlan, view: AnswerTensors) -> None:
        if not self.execution.graph:
            self._state.step(plan, view)
            return
        moves = (self._cache.moves, self._state.moves)
        if moves != self._graphs_of:  # the graphs hold the old buffers
            self._graphs.clear()
            self._graphs_of = moves
        if plan not in self._graphs:
            self._graphs[plan] = self._record(lambda: self._state.step(plan, view))
        self._graphs[plan]()

    # -- what was drawn

    def _keep(self, answers: Sequence[Answer], drawn_BS: Tensor, news: News) -> None:
        """Add the tokens to the answers, and free those that have ended."""
        for answer, tokens in zip(answers, drawn_BS.tolist(), strict=True):
            new = [token for token in tokens if token not in (NOTHING_DRAWN, NOT_FINITE)]
            finish = answer.take(new) if new else None
            if new:
                news.add(answer, new, finish)
            if NOT_FINITE in tokens:
                for row in answer.rows:
                    assert row.slot is not None
                    self._cache.erase(row.slot)
                news.failed(answer)
            if NOT_FINITE in tokens or finish is not None:
                self._release(answer)


def _place_in_cache(row: Row) -> tuple[int, int]:
    assert row.slot is not None
    return row.slot.shelf.columns, row.slot.number


def _in_guided_image(answer: Answer) -> bool:
    return len(answer.rows) > 1 and answer.image_place.is_inside


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are read in one pass: neighbours of similar lengths on one shelf."""
    batches: list[list[Row]] = []
    real = 0
    for row in rows:
        batch = batches[-1] if batches else None
        if batch and batch[0].slot and row.slot and batch[0].slot.shelf is row.slot.shelf:
            padded = (len(batch) + 1) * row.tokens  # they are sorted by length
            if padded <= PROMPT_TOKENS and padded <= 2 * (real + row.tokens):
                batch.append(row)
                real += row.tokens
                continue
        batches.append([row])
        real = row.tokens
    return batches
