"""Tensor-parallel ranks that decode side by side: rank 0 says what to do, and all do the same.

    decoder = LockstepDecoder(decoder, channel)   # on rank 0, used like the decoder itself
    follow(decoder, channel)                      # on every other rank, until rank 0 closes its own

Only rank 0 has requests. A decoder gives the same tokens for the same calls in the same order, so
rank 0 sends its calls to the others at each step's border. With every message goes a checksum of
the tokens of the last step, so that ranks that draw different tokens stop instead of mixing up
their layers.

Messages go over gloo, where waiting costs no processor time. An idle rank 0 sends a sign of life
now and then: ranks notice within seconds if another one has ended, and after a few minutes if it
has stopped without an end.
"""

import contextlib
import logging
import os
import pickle
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeAlias

import torch
from torch.distributed import ProcessGroup

from megatron_chameleon.errors import PeerError, first_line
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder, Event
from megatron_chameleon.inference.engine.interface import EngineUsage, TokenRequest

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_SECONDS = 5.0
SILENCE_SECONDS = 300.0
"""How long a rank may send or take nothing."""
END_SECONDS = 10.0
"""How long a rank that waits in a collective of the model for one that has ended may take to notice
it. gloo notices at once, NCCL after many minutes."""

REMEDY = "See what the other ranks say first, and start all of them again"

Call = tuple[str, Any]
"""The name of a method or attribute of the decoder, and its argument or value."""


class Kind(IntEnum):
    """What a message asks for."""

    STEP = 0
    LIFE = 1
    """Nothing: rank 0 is still there."""
    STOP = 2


class Channel:
    """The way from rank 0 of a group of processes to the others.

    Making one is a collective of the whole job.

    Args:
        ranks: The processes of the group; the first one is its rank 0. None: all of the job.
    """

    def __init__(self, ranks: list[int] | None = None) -> None:
        self._group: ProcessGroup | None = torch.distributed.new_group(
            ranks, timedelta(seconds=SILENCE_SECONDS), backend="gloo"
        )
        world = torch.distributed.get_world_size()
        self.ranks = list(range(world)) if ranks is None else ranks
        self._lock = threading.Lock()

    @property
    def group(self) -> ProcessGroup | None:
        """For small collectives on the CPU."""
        return self._group

    def agree(self, ready: bool) -> bool:
        """Whether all ranks are ready; all of them call it."""
        if len(self.ranks) == 1:
            return ready
        flag = torch.tensor(int(ready))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(flag)

    def send(self, kind: Kind, checksum: int, calls: list[Call]) -> None:
        """Send a message to all other ranks.

        Raises:
            RuntimeError: A rank has ended.
        """
        if len(self.ranks) == 1:
            return
        content = pickle.dumps(calls) if calls else b""
        header = torch.tensor([kind, checksum, len(content)])
        with self._lock:
            self._broadcast(header)
            if content:
                self._broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def receive(self) -> tuple[Kind, int, list[Call]]:
        """Wait for the next message of rank 0.

        Raises:
            RuntimeError: Rank 0 has ended or is silent.
        """
        header = torch.zeros(3, dtype=torch.int64)
        self._broadcast(header)
        kind, checksum, size = header.tolist()
        content = torch.empty(size, dtype=torch.uint8)
        if size:
            self._broadcast(content)
        calls = pickle.loads(content.numpy().tobytes()) if size else []
        return Kind(kind), checksum, calls

    def _broadcast(self, tensor: torch.Tensor) -> None:
        torch.distributed.broadcast(tensor, src=self.ranks[0], group=self._group)


def end_process(error: PeerError) -> None:
    """What a rank does that cannot go on: say why, and end at once, whatever its threads wait for.

    Its open connections could not be served any more, and the launcher ends the other ranks.
    """
    logger.error("error: %s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(error.exit_code)


class LockstepDecoder:
    """``ContinuousDecoder`` of rank 0, which the other ranks follow.

    Args:
        decoder: This rank's.
        channel: The way to the other ranks.
        fail: What to do if another rank has ended; it must not return.
        close: Called at the end.
    """

    def __init__(
        self,
        decoder: ContinuousDecoder,
        channel: Channel,
        fail: Callable[[PeerError], None] = end_process,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder, self._channel, self._fail, self._close = decoder, channel, fail, close
        self._where = f"rank 0 of {len(channel.ranks)}"
        self._calls: list[Call] = []
        self._checksum = 0
        self._closed = threading.Event()
        self._life = threading.Thread(target=self._show_life, name="sign of life", daemon=True)
        if len(channel.ranks) > 1:
            self._life.start()

    @property
    def max_rows(self) -> int:
        """As of the decoder."""
        return self._decoder.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        if rows != self._decoder.max_rows:
            self._do("max_rows", rows)

    @property
    def execution(self) -> Any:
        """As of the decoder."""
        return self._decoder.execution

    @property
    def device(self) -> torch.device:
        """As of the decoder."""
        return self._decoder.device

    @property
    def context_tokens(self) -> int:
        """As of the decoder."""
        return self._decoder.context_tokens

    def limit_cache(self, size: int) -> None:
        """As of the decoder, on each rank."""
        self._do("limit_cache", size)

    def check(self, request: TokenRequest) -> None:
        """As of the decoder."""
        self._decoder.check(request)

    def usage(self) -> EngineUsage:
        """As of the decoder."""
        return self._decoder.usage()

    def add(self, request: TokenRequest) -> int:
        """As of the decoder."""
        self._decoder.check(request)  # the others must not see what is refused
        return self._do("add", request)

    def cancel(self, number: int) -> None:
        """As of the decoder."""
        self._do("cancel", number)

    def step(self) -> list[Event]:
        """As of the decoder. If it fails, the job ends, for the other ranks may be in the middle of
        a step that nobody can finish."""
        try:
            self._send(Kind.STEP)
            events = self._decoder.step()
        except Exception as error:
            if len(self._channel.ranks) > 1:
                self._fail(_failed_step(self._where, error))
            raise
        self._checksum = checksum_of(events)
        return events

    def abandon(self) -> list[int]:
        """As of the decoder, of a single rank: with several, ``step`` has ended the job."""
        assert len(self._channel.ranks) == 1, "the other ranks may be in the middle of a step"
        return self._decoder.abandon()

    def close(self) -> None:
        """Let the other ranks end."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(RuntimeError):  # one that has ended needs no message
            self._send(Kind.STOP)
        if self._life.is_alive():
            self._life.join(SIGN_OF_LIFE_SECONDS)
        self._close()

    def _do(self, name: str, value: Any) -> Any:
        """Call the decoder, and remember the call for the other ranks."""
        result = apply(self._decoder, (name, value))
        if len(self._channel.ranks) > 1:
            self._calls.append((name, value))
        return result

    def _send(self, kind: Kind) -> None:
        calls, self._calls = self._calls, []
        self._channel.send(kind, self._checksum, calls)

    def _show_life(self) -> None:
        while not self._closed.wait(SIGN_OF_LIFE_SECONDS):
            try:
                self._channel.send(Kind.LIFE, 0, [])
            except RuntimeError as error:
                if self._closed.is_set():
                    return
                what = f"another rank has ended or does not answer ({first_line(error)[:200]})"
                self._fail(PeerError(self._where, what, REMEDY))


AnyDecoder: TypeAlias = ContinuousDecoder | LockstepDecoder


def follow(
    decoder: ContinuousDecoder,
    channel: Channel,
    rank: int,
    fail: Callable[[PeerError], None] = end_process,
) -> None:
    """Do what rank 0 does, until it closes its decoder.

    Args:
        decoder: This rank's.
        channel: The way from rank 0.
        rank: Of this process, for errors.
        fail: What to do if rank 0 has ended while this rank waits for it inside a step; it must not
            return.

    Raises:
        PeerError: Rank 0 has ended, or the ranks draw different tokens.
    """
    where = f"rank {rank}"
    checksum = 0
    for kind, expected, calls in _messages(channel, where, fail):
        if expected != checksum:
            what = "it has drawn other tokens than rank 0"
            remedy = "Start all ranks on the same kind of processor, with the same packages"
            raise PeerError(where, what, remedy)
        for call in calls:
            apply(decoder, call)
        if kind is Kind.STEP:
            try:
                checksum = checksum_of(decoder.step())
            except RuntimeError as error:
                raise _failed_step(where, error) from error


def _messages(
    channel: Channel, where: str, fail: Callable[[PeerError], None]
) -> Iterator[tuple[Kind, int, list[Call]]]:
    """The messages up to the last one, which is given too; signs of life are left out.

    A thread takes them, so that a rank which waits inside a step notices that rank 0 has ended.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()
    taken = threading.Event()

    def listen() -> None:
        try:
            while True:
                kind, *rest = channel.receive()
                if kind is not Kind.LIFE:
                    found.put((kind, *rest))
                if kind is Kind.STOP:
                    return
        except RuntimeError as error:
            what = f"rank 0 has ended or is silent ({first_line(error)[:200]})"
            ended = PeerError(where, what, REMEDY)
            found.put(ended)
            if not taken.wait(END_SECONDS):
                fail(ended)

    threading.Thread(target=listen, name="lockstep", daemon=True).start()
    while True:
        message = found.get()
        if isinstance(message, PeerError):
            taken.set()
            raise message
        yield message
        if message[0] is Kind.STOP:
            return


def _failed_step(where: str, error: Exception) -> PeerError:
    what = f"a step failed ({type(error).__name__}: {first_line(error)[:300]})"
    return PeerError(where, what, REMEDY)


def apply(decoder: ContinuousDecoder, call: Call) -> Any:
    """Do one call, or set one attribute."""
    name, value = call
    if name == "max_rows":
        decoder.max_rows = value
        return None
    return getattr(decoder, name)(value)


def checksum_of(events: list[Event]) -> int:
    """Of the requests and tokens of a step; errors count as such."""
    drawn = [(number, getattr(chunk, "token_ids", None)) for number, chunk in events]
    return zlib.crc32(repr(drawn).encode())
