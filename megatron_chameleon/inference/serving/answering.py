"""Answers requests through the engine, within limits of number and time."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import cast

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.inference.answers.stream import AnswerEvent, AnswerStream, ImageCodes
from megatron_chameleon.inference.engine.interface import (
    EngineError,
    FinishReason,
    TokenChunk,
    TokenEngine,
    TokenRequest,
)
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.prompts import answer_room
from megatron_chameleon.inference.serving.metrics import Metrics
from megatron_chameleon.inference.serving.model import ServedModel
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import (
    NO_RETRY,
    Refusal,
    bad,
    refusal_of,
)

_QUEUED_EVENTS = 32
"""Of one request. A client that reads slowly holds up its answers, and memory stays the same."""
_GROWTH_STEPS = 12


@dataclass(frozen=True)
class Finish:
    """An answer is whole."""

    reason: FinishReason
    token_ids: list[int]


class Ping:
    """Nothing has happened for a while."""


Piece = AnswerEvent | Finish | Ping


@dataclass
class Ask:
    """One prompt and the answers to it."""

    prompt: list[int]
    options: Sequence[GenerationOptions]
    """Of each answer."""
    max_tokens: int | None


class Place:
    """The place of a request in the queue: its answers that have no token yet."""

    def __init__(self, queue: "Queue") -> None:
        self.started = time.monotonic()
        self._queue, self._waiting = queue, 0

    def take(self, answers: int) -> None:
        """Let so many answers wait, in all.

        Raises:
            Refusal: The queue is full.
        """
        self._queue.take(answers - self._waiting)
        self._waiting = answers

    def leave(self, answers: int | None = None) -> None:
        """So many answers wait no more; None is all of them."""
        count = self._waiting if answers is None else answers
        self._waiting -= count
        self._queue.waiting -= count


class Queue:
    """Counts the answers that wait for their first token, with those whose prompt is read."""

    def __init__(self, places: int) -> None:
        self.places, self.waiting = places, 0

    def take(self, answers: int) -> None:
        """Let more answers wait.

        Raises:
            Refusal: There is no room for them.
        """
        if self.waiting + answers > self.places:
            what = f"{self.waiting:,} answers wait, and the queue has {self.places:,} places"
            again = {"retry-after": str(min(30, 1 + self.waiting // 8))}
            remedy = "Send it again later"
            raise Refusal(429, "server", what, remedy, code="queue_full", headers=again)
        self.waiting += answers


class Answerer:
    """Hands requests to the engine.

    Args:
        engine: It is started and stopped by the caller.
        model: Whose tokens these are.
        limits: Of the server.
        metrics: Counts what happens.

    Attributes:
        is_draining: Whether new requests are refused, because the server stops.
    """

    def __init__(
        self, engine: TokenEngine, model: ServedModel, limits: Limits, metrics: Metrics
    ) -> None:
        self._engine, self._model, self._limits, self._metrics = engine, model, limits, metrics
        self._queue = Queue(limits.queue)
        self._tasks: set[asyncio.Task[None]] = set()
        self._image_ids = TokenClasses(model.tokenizer.vocabulary).image_token_ids
        # the smallest request; an engine that refuses it has come to its end
        self._probe = TokenRequest((model.tokenizer.vocabulary.bos,), 1, GenerationOptions())
        self.is_draining = False

    @property
    def requests(self) -> int:
        """Requests that are being read or answered."""
        return len(self._tasks)

    def cancel_all(self) -> None:
        """End all requests, because the server stops."""
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[Place]:
        """A place in the queue for a request that is read and answered inside.

        Raises:
            Refusal: The queue is full, or the server stops.
        """
        self.check_alive()
        place = Place(self._queue)
        place.take(1)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield place
        finally:
            place.leave()
            self._tasks.discard(task)

    def check_alive(self) -> None:
        """Refuse everything while the server stops, or without an engine."""
        if self.is_draining:
            again = {"retry-after": "5", "connection": "close"}
            raise Refusal(503, "server", "it is stopping", "Send it again later", headers=again)
        try:
            self._engine.check(self._probe)
        except EngineError as error:
            raise Refusal(503, error.where, error.what, error.remedy, headers=NO_RETRY) from error

    def check(self, ask: Ask) -> list[TokenRequest]:
        """The engine's requests for the answers to a prompt.

        Raises:
            Refusal: The prompt is too long, or the engine cannot do what is asked.
        """
        count, context, force = len(ask.prompt), self._engine.context_tokens, ask.options[0].force
        most = self._limits.prompt_tokens
        if most is not None and count > most:
            what = f"it has {count:,} tokens, and the limit is {most:,}"
            raise bad("prompt", what, "Shorten it", "context_length_exceeded")
        if force is Force.IMAGE and not self._model.draws:
            lacks = "image decoder" if self._model.tokenizer.image else "image tokenizer"
            what = f"this model has no {lacks}, so it draws nothing"
            raise bad("force", what, "Leave it out", "images_not_supported")
        try:
            needed = self._model.tokenizer.image_form.tokens_needed(ask.options[0].size)
            tokens = answer_room(count, context, needed, force, ask.max_tokens)
        except (ConfigError, DataError) as error:
            code = "context_length_exceeded" if error.where == "prompt" else None
            raise bad(error.where, error.what, error.remedy, code) from error
        requests = [TokenRequest(tuple(ask.prompt), tokens, options) for options in ask.options]
        try:
            self._engine.check(requests[0])
        except ChameleonError as error:
            raise refusal_of(error) from error
        return requests

    async def answer(
        self, requests: Sequence[TokenRequest], place: Place, growing: bool = False
    ) -> AsyncIterator[tuple[int, Piece]]:
        """The events of all answers as they come, with the number of the answer.

        Closing the iterator cancels the answers.

        Args:
            requests: One for each answer.
            place: Of the client's request.
            growing: Whether ``ImageCodes`` are wanted, some ``_GROWTH_STEPS`` for each image.

        Raises:
            Refusal: A time limit has passed, or the engine refuses.
        """
        place.take(len(requests))
        events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_QUEUED_EVENTS)

        async def pump(number: int, request: TokenRequest) -> None:
            try:
                await self._draw(request, place, growing, lambda piece: events.put((number, piece)))
            except Exception as error:
                await events.put((number, error))

        pumps = [asyncio.create_task(pump(n, request)) for n, request in enumerate(requests)]
        left = len(pumps)
        try:
            while left:
                try:
                    async with asyncio.timeout(self._limits.ping_seconds):
                        number, piece = await events.get()
                except TimeoutError:
                    yield 0, Ping()
                    continue
                if isinstance(piece, ChameleonError):
                    raise refusal_of(piece) from piece
                if isinstance(piece, Exception):
                    raise piece
                left -= isinstance(piece, Finish)
                yield number, piece
        finally:
            if left:
                self._metrics.cancelled.labels("cancelled").inc(left)
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _draw(
        self,
        request: TokenRequest,
        place: Place,
        growing: bool,
        put: Callable[[Piece], Awaitable[None]],
    ) -> None:
        """Draw one answer and hand over its events."""
        asked = time.monotonic()
        stream = AnswerStream(self._model.tokenizer, request.options.stop)
        token_ids: list[int] = []
        shown: dict[int, int] = {}
        reason = None
        async with aclosing(cast(AsyncGenerator[TokenChunk], self._engine.generate(request))) as it:
            while reason is None and not stream.is_ended:
                chunk = await self._next(it, asked, place, is_first=not token_ids)
                if chunk is None:
                    break
                if not token_ids and chunk.token_ids:
                    self._saw_first(asked, place)
                    first = time.monotonic()
                token_ids += chunk.token_ids
                reason = chunk.finish
                for event in stream.feed(chunk.token_ids):
                    if not isinstance(event, ImageCodes) or (growing and self._shows(event, shown)):
                        await put(event)
        for event in stream.finish():
            await put(event)
        del token_ids[stream.token_count :]
        if len(token_ids) > 1:
            self._metrics.per_token.observe((time.monotonic() - first) / (len(token_ids) - 1))
        self._count(token_ids)
        is_stopped = stream.is_ended or stream.stopped_by is not None
        await put(
            Finish(FinishReason.STOP if is_stopped else reason or FinishReason.LENGTH, token_ids)
        )

    async def _next(
        self, chunks: AsyncGenerator[TokenChunk], asked: float, place: Place, is_first: bool
    ) -> TokenChunk | None:
        limits = self._limits
        end = place.started + limits.request_seconds
        queue_end = asked + limits.queue_seconds
        try:
            async with asyncio.timeout_at(min(end, queue_end) if is_first else end):
                return await anext(chunks, None)
        except TimeoutError as error:
            if is_first and queue_end < end:
                what = f"no answer began within {limits.queue_seconds:g} seconds"
                again = {"retry-after": "10"}
                raise Refusal(
                    503, "server", what, "Send it again later", code="queue_timeout", headers=again
                ) from error
            what = f"the answer took longer than {limits.request_seconds:g} seconds"
            remedy = "Ask for fewer tokens, or start the server with a larger --request-seconds"
            raise Refusal(
                504, "server", what, remedy, code="request_timeout", headers=NO_RETRY
            ) from error

    def _shows(self, event: ImageCodes, shown: dict[int, int]) -> bool:
        """Whether an image has grown enough to be shown again."""
        step = max(1, event.grid.codes // _GROWTH_STEPS)
        if len(event.codes) - shown.get(event.index, 0) < step:
            return False
        shown[event.index] = len(event.codes)
        return True

    def _saw_first(self, asked: float, place: Place) -> None:
        now = time.monotonic()
        place.leave(1)
        self._metrics.queue.observe(now - asked)
        self._metrics.first_token.observe(now - place.started)

    def _count(self, token_ids: Sequence[int]) -> None:
        images = sum(token_id in self._image_ids for token_id in token_ids)
        self._metrics.tokens.labels("image").inc(images)
        self._metrics.tokens.labels("text").inc(len(token_ids) - images)
