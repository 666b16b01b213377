"""The engine as a service: a thread that decodes, and an event loop that hands over the tokens.

    engine = DecoderEngine(decoder)
    await engine.start()
    async for chunk in engine.generate(request):
        print(chunk.token_ids)
    await engine.stop(seconds=10)

The thread alone touches the decoder. It takes commands from a queue between two steps, and gives
the tokens of a step to the loop in one call. Tokens that nobody has read yet are kept in one list
per answer, so a slow reader holds nobody up, and what it leaves unread is bounded by
``max_new_tokens`` of its request.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_chameleon.inference.engine.batching.continuous import Event
from megatron_chameleon.inference.engine.batching.lockstep import AnyDecoder, LockstepDecoder
from megatron_chameleon.inference.engine.interface import (
    EngineError,
    EngineUsage,
    FinishReason,
    TokenChunk,
    TokenRequest,
    stopping,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """A request between loop and thread. The loop alone touches all but ``number``."""

    request: TokenRequest
    number: int = 0
    """Its id in the decoder, which the thread sets."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens that nobody has read yet."""
    finish: FinishReason | None = None
    error: EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, event: TokenChunk | EngineError) -> None:
        if isinstance(event, EngineError):
            self.error = event
        else:
            self.token_ids += event.token_ids
            self.finish = event.finish
        self.news.set()


class DecoderEngine:
    """``TokenEngine`` over a decoder, of this process or of several ranks.

    Args:
        decoder: Its owner must not use it any more.
    """

    def __init__(self, decoder: AnyDecoder) -> None:
        self._decoder: AnyDecoder | None = decoder
        self.context_tokens: int = decoder.context_tokens
        self._usage, self._coming = decoder.usage(), 0
        """After the last step, and requests that the thread had not taken by then."""
        self._stopping = False
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._commands: queue.SimpleQueue[Callable[[AnyDecoder], None]] = queue.SimpleQueue()
        # the thread alone uses these
        self._tickets: dict[int, _Ticket] = {}
        self._draining = False

    async def start(self) -> None:
        """Start the thread."""
        assert self._thread is None, "an engine is started once"
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    def check(self, request: TokenRequest) -> None:
        """As ``TokenEngine.check``."""
        if self._stopping or self._decoder is None:
            raise stopping()
        self._decoder.check(request)

    async def generate(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """As ``TokenEngine.generate``."""
        self.check(request)
        ticket = _Ticket(request)
        self._coming += 1
        self._commands.put(lambda decoder: self._add(decoder, ticket))
        try:
            while True:
                await ticket.news.wait()
                ticket.news.clear()
                # more may come while the reader has the chunk
                token_ids, finish, error = ticket.token_ids, ticket.finish, ticket.error
                ticket.token_ids = []
                if token_ids or finish is not None:
                    yield TokenChunk(token_ids, finish)
                if finish is not None:
                    return
                if error is not None:
                    raise error
        finally:
            if ticket.finish is None and ticket.error is None:
                self._commands.put(lambda decoder: self._cancel(decoder, ticket))

    def usage(self) -> EngineUsage:
        """As ``TokenEngine.usage``, after the last step."""
        return replace(self._usage, waiting=self._usage.waiting + self._coming)

    async def stop(self, seconds: float) -> None:
        """As ``TokenEngine.stop``. What is cancelled ends with an ``EngineError``."""
        self._stopping = True
        if self._thread is None:
            return
        self._commands.put(self._drain)
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            self._commands.put(self._cancel_all)
            await self._ended.wait()

    # -- in the thread

    def _work(self) -> None:
        """Take commands and decode, until there is nothing left to do after ``_drain``."""
        decoder = self._decoder
        assert decoder is not None
        try:
            while self._take_commands(decoder):
                self._deliver(decoder, self._step(decoder))
        except Exception as error:
            logger.exception("the engine has failed")
            self._stopping = True
            self._end_all(decoder, f"it failed: {_described(error)}")
        finally:
            self._decoder = None
            if isinstance(decoder, LockstepDecoder):
                decoder.close()
            self._tell(self._ended.set)

    def _take_commands(self, decoder: AnyDecoder) -> bool:
        """Take the commands that are there, and wait for one if there is nothing to decode.

        Returns:
            Whether there is anything to decode; if not, the thread ends.
        """
        while True:
            idle = not self._tickets
            if idle and self._draining and self._commands.empty():
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            command(decoder)

    def _add(self, decoder: AnyDecoder, ticket: _Ticket) -> None:
        ticket.number = decoder.add(ticket.request)
        self._tickets[ticket.number] = ticket
        self._tell(self._arrived, decoder.usage())

    def _cancel(self, decoder: AnyDecoder, ticket: _Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            decoder.cancel(ticket.number)
            self._deliver(decoder, [])

    def _drain(self, decoder: AnyDecoder) -> None:
        self._draining = True

    def _cancel_all(self, decoder: AnyDecoder) -> None:
        for number in self._tickets:
            decoder.cancel(number)
        self._end_all(decoder, "it was stopped")

    def _end_all(self, decoder: AnyDecoder, what: str) -> None:
        error = EngineError("engine", what, "Ask again when it has been started")
        self._deliver(decoder, [(number, error) for number in self._tickets])

    def _step(self, decoder: AnyDecoder) -> list[Event]:
        """A step of the decoder. An error ends the answers that grow; those that wait go on."""
        try:
            return decoder.step()
        except Exception as error:
            logger.exception("a step of the engine has failed")
            lost = decoder.abandon()
            what, remedy = f"a step failed: {_described(error)}", "Ask again"
            if isinstance(error, torch.OutOfMemoryError):
                what = f"{_described(error)}, with {len(lost)} answers at once"
                remedy = "Give the cache less memory, or compute fewer rows at once"
            return [(number, EngineError("engine", what, remedy)) for number in lost]

    def _deliver(self, decoder: AnyDecoder, events: Sequence[Event]) -> None:
        """Hand the events to the loop, in one call."""
        handed = [(self._tickets[number], event) for number, event in events]
        for number, event in events:
            if isinstance(event, EngineError) or event.finish is not None:
                self._tickets.pop(number, None)
        self._tell(self._hand_over, handed, decoder.usage())

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function on the loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, and nobody reads any more
            self._draining = True
            self._tickets.clear()

    # -- on the loop

    def _arrived(self, usage: EngineUsage) -> None:
        self._coming -= 1
        self._usage = usage

    def _hand_over(
        self, handed: Sequence[tuple[_Ticket, TokenChunk | EngineError]], usage: EngineUsage
    ) -> None:
        self._usage = usage
        for ticket, event in handed:
            ticket.take(event)


def _described(error: Exception) -> str:
    """An error in one line."""
    first = (str(error).splitlines() or [""])[0].strip()[:200]
    name = type(error).__name__
    return f"{name}: {first}" if first else name
