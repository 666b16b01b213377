"""Works on blocks in worker processes and returns the results in order.

    pool = Pool(make_encoder, (folder, options), workers=4)
    for encoded in pool.work(blocks): ...

``make_encoder(folder, options)`` is called once in each worker, when its first block comes, and
returns the function that takes a block.

At most two blocks per worker are in flight, and of large blocks fewer, so memory does not grow with
the input. Each worker computes on one thread, because blocks are what is parallel. Workers read
local files of lines themselves, and the parent only writes. A worker whose parent was killed exits
at once, and one that is killed ends the command with a line that names it. When the parent stops
for any reason, the workers are killed: they may be stuck in a decoder, and have nothing to save.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

from megatron_chameleon.data.inputs.records import Block, FileSlice, ParquetRows, TarSamples
from megatron_chameleon.errors import DataError

BLOCKS_PER_WORKER = 2
LEAST_BYTES_IN_FLIGHT = 64 << 20
BYTES_IN_FLIGHT_PER_WORKER = 16 << 20
_END_SECONDS = 5


@dataclass
class _Task:
    """A block that a worker has; its content is not kept here."""

    where: str
    size: int
    is_done: bool = False
    result: Any = None


@dataclass
class _Worker:
    process: Any
    pipe: "Connection[Any, Any]"
    tasks: deque[_Task] = field(default_factory=deque)


class Pool:
    """Worker processes, each with a pipe of its own. One is started when all others are busy.

    Args:
        make: A function of a module. Called with the arguments in each worker, it returns the
            function that turns a block into a result, which must be possible to pickle.
        arguments: What it is called with.
        workers: Largest number of processes.
        context: Of multiprocessing, if the arguments have its locks.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[Block], Any]],
        arguments: tuple[Any, ...],
        workers: int,
        context: BaseContext | None = None,
    ) -> None:
        self._context: Any = context or multiprocessing.get_context("spawn")
        self._arguments = (make, arguments)  # what they hold lives as long as the workers use it
        self._most_workers = workers
        self._most_bytes = max(LEAST_BYTES_IN_FLIGHT, workers * BYTES_IN_FLIGHT_PER_WORKER)
        self._workers: list[_Worker] = []
        self._in_flight: deque[_Task] = deque()

    def _start_worker(self) -> _Worker:
        # only the parent handles Ctrl-C, also while a worker is being started
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_work, args=(theirs, *self._arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return self._workers[-1]

    def work(self, blocks: Iterator[Block]) -> Iterator[Any]:
        """The results of blocks, in order; at most two blocks per worker are read ahead.

        Raises:
            DataError: If a worker fails for a reason that is not the fault of one document, or
                dies.
        """
        waiting = next(blocks, None)
        while waiting is not None or self._in_flight:
            while waiting is not None and self._has_room(waiting):
                self._send(waiting)
                waiting = next(blocks, None)
            self._receive()
            while self._in_flight and self._in_flight[0].is_done:
                yield self._in_flight.popleft().result

    def kill(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_END_SECONDS)
            worker.pipe.close()

    def _has_room(self, block: Block) -> bool:
        if not self._in_flight:
            return True
        size = sum(task.size for task in self._in_flight) + _size_of(block)
        most = BLOCKS_PER_WORKER * self._most_workers
        return len(self._in_flight) < most and size <= self._most_bytes

    def _send(self, block: Block) -> None:
        worker = min(self._workers, key=lambda worker: len(worker.tasks), default=None)
        if worker is None or (worker.tasks and len(self._workers) < self._most_workers):
            worker = self._start_worker()
        task = _Task(f"{block.path}:{block.record + 1}", _size_of(block))
        self._in_flight.append(task)
        worker.tasks.append(task)
        try:
            worker.pipe.send_bytes(pickle.dumps(block, pickle.HIGHEST_PROTOCOL))
        except (BrokenPipeError, ConnectionResetError):
            raise self._death_of(worker) from None

    def _receive(self) -> None:
        """Wait for a result, and take all that are there."""
        pipes = {worker.pipe: worker for worker in self._workers if worker.tasks}
        for ready in wait(list(pipes)):
            worker = pipes[ready]  # type: ignore[index]
            try:
                found = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self._death_of(worker) from None
            if isinstance(found, BaseException):
                raise found
            task = worker.tasks.popleft()
            task.result, task.is_done = found, True

    def _death_of(self, worker: _Worker) -> DataError:
        worker.process.join(_END_SECONDS)
        code = worker.process.exitcode
        how = f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was killed ({signal.Signals(-code).name})"
        what = f"worker process {worker.process.pid} {how} at or after this document"
        remedy = "If the system ran out of memory, use fewer --workers. The same command continues"
        return DataError(worker.tasks[0].where, what, remedy)


def _size_of(block: Block) -> int:
    """Bytes of the records of a block."""
    payload = block.payload
    if isinstance(payload, FileSlice):
        return payload.size
    if isinstance(payload, TarSamples):
        return sum(len(content) for sample in payload.samples for content in sample.values())
    if isinstance(payload, ParquetRows):
        return len(payload.stream)
    return len(payload) if isinstance(payload, bytes) else 0


# In a worker


def _work(
    pipe: "Connection[Any, Any]",
    make: Callable[..., Callable[[Block], Any]],
    arguments: tuple[Any, ...],
) -> None:
    """Work on the blocks that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ignore_image_warnings()
    blocks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # the parent must be able to send while this worker computes: it may be about to receive
    threading.Thread(target=_take_blocks, args=(pipe, blocks), daemon=True).start()
    handle = None
    while (content := blocks.get()) is not None:
        found: Any
        try:
            if handle is None:
                handle = make(*arguments)
            found = handle(pickle.loads(content))
        except Exception as error:
            error.add_note(traceback.format_exc())
            found = error
        pipe.send(found)


def _take_blocks(pipe: "Connection[Any, Any]", blocks: "queue.SimpleQueue[bytes | None]") -> None:
    with suppress(EOFError, OSError):
        while True:
            blocks.put(pipe.recv_bytes())
    blocks.put(None)


def _end_with_parent() -> None:
    """Exit when the parent dies, whatever this worker is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def ignore_image_warnings() -> None:
    """Pillow warns of large images; their limit is an option of ours."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
