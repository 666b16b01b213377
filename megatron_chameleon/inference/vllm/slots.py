"""Who may enter vLLM's batch: first come, first served, and the rows of a request all at once.

vLLM admits requests one by one, so the passes of a guided image would enter a full batch apart from
each other, again and again. With this in front of it, it never has more requests than places.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Slots:
    """Places in a batch.

    Args:
        places: Number of places.

    Attributes:
        running: Requests that have places.
        waiting: Requests that wait for them.
    """

    def __init__(self, places: int) -> None:
        self.places = self._free = places
        self.running = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed: Exception | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def take(self, rows: int) -> AsyncIterator[None]:
        """Wait for places, at most ``places`` of them, and give them back at the end."""
        assert rows <= self.places
        if self._closed is not None:
            raise self._closed
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((rows, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # not admitted yet
                with suppress(ValueError):
                    self._queue.remove((rows, turn))
            elif turn.exception() is None:
                self._leave(rows)
            self._admit()
            raise
        try:
            yield
        finally:
            self._leave(rows)
            self._admit()

    def close(self, error: Exception) -> None:
        """Raise an error for all who wait, and for all who come later."""
        self._closed = error
        while self._queue:
            self._queue.popleft()[1].set_exception(error)

    def _admit(self) -> None:
        while self._queue and self._queue[0][0] <= self._free:
            rows, turn = self._queue.popleft()
            self._free -= rows
            self.running += 1
            turn.set_result(None)

    def _leave(self, rows: int) -> None:
        self._free += rows
        self.running -= 1
