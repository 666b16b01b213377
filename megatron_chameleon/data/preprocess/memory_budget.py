"""Memory that all workers of a command share: what takes much of it waits until there is room.

A large picture takes half a gigabyte while it is decoded, and a long text 30 times its size while
it is encoded. Any number of them may come at the same time, in any number of workers.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64
from multiprocessing.context import BaseContext
from typing import Any

LEAST_BYTES = 512 << 20
BYTES_PER_WORKER = 128 << 20
FREE_BYTES = 2 << 20
"""What takes no more than this is not counted."""

LARGE_FILE_BYTES = 32 << 20


class MemoryBudget:
    """A number of bytes, of which parts can be reserved.

    Args:
        workers: Processes that share it; more processes have more.
        context: Of multiprocessing, if there are several.
    """

    def __init__(self, workers: int = 1, context: BaseContext | None = None) -> None:
        self.size = max(LEAST_BYTES, workers * BYTES_PER_WORKER)
        self._free: Any = c_int64(self.size)
        self._changed: Any = threading.Condition()
        self._next: Any = threading.Lock()
        self._large: Any = threading.Lock()
        if context is not None:
            self._free = context.RawValue(c_int64, self.size)
            self._changed = context.Condition()
            self._next = context.Lock()
            self._large = context.Lock()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes are free, or all if it is more, and keep them for the block.

        Who asks first gets first, so that large parts come at last between small ones.
        """
        if size <= FREE_BYTES:
            yield
            return
        size = min(size, self.size)
        with self._next, self._changed:
            self._changed.wait_for(lambda: self._free.value >= size)
            self._free.value -= size
        try:
            yield
        finally:
            with self._changed:
                self._free.value += size
                self._changed.notify_all()

    @contextmanager
    def large_file(self, size: int) -> Iterator[None]:
        """Hold one file of more than ``LARGE_FILE_BYTES`` at a time; memory may be reserved too."""
        if size <= LARGE_FILE_BYTES:
            yield
            return
        with self._large:
            yield
