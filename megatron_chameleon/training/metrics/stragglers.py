"""Which rank is slow: in a synchronous job every step takes as long as the slowest rank's.

So a rank's time is taken where it has not waited for other data-parallel ranks yet: from the start
of a step to the moment before gradients are reduced, and apart from that how long it waits for its
data. Ranks of one tensor-parallel or pipeline group wait for each other within that time: such a
group is slow as a whole.
"""

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import broadcast
from megatron_chameleon.parallel.topology import Topology

SLOW = 1.3
"""Times the median of the ranks from which a rank is called slow."""
SMALLEST_SECONDS = 0.05
"""A step that is slower by less than that is left in peace."""


class StepClock:
    """Times what a rank does in a step before it waits; on a GPU by events, without a wait.

    Attributes:
        phase: What the engine is doing, for people.
        data_seconds: How long the rank has waited for its data since the last ``take``.
    """

    def __init__(self) -> None:
        self.phase = "between steps"
        self.data_seconds = 0.0
        self._parts: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def start(self) -> None:
        """A part of the step that counts begins."""
        self.phase = "forward and backward"
        self._begin = _now()

    def stop(self, phase: str = "gradient reduction and update") -> None:
        """It has ended, and what follows may wait for others."""
        self.phase = phase
        if self._begin is not None:
            self._parts.append((self._begin, _now()))
            self._begin = None

    def take(self) -> tuple[float, float]:
        """Seconds of all parts, and of waiting for data, since the last call.

        On a GPU it waits for the last part, which has ended when the gradients' norm is known.
        """
        parts, self._parts = self._parts, []
        waited, self.data_seconds = self.data_seconds, 0.0
        return sum(_between(begin, end) for begin, end in parts), waited


@dataclass(frozen=True)
class Window:
    """What the ranks did over some steps: seconds a step of each, medians over the steps."""

    rank_seconds: Sequence[float]
    data_seconds: Sequence[float]

    @property
    def slowest(self) -> int:
        return max(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)

    @property
    def median(self) -> float:
        """Of two ranks the faster one's, so that the other can stand out."""
        return statistics.median_low(self.rank_seconds)

    @property
    def slow_rank(self) -> int | None:
        """The slowest rank, if it is far behind the others."""
        most = self.rank_seconds[self.slowest]
        is_slow = most > SLOW * self.median and most - self.median > SMALLEST_SECONDS
        return self.slowest if is_slow else None

    def metrics(self) -> dict[str, float | int]:
        """For ``metrics.jsonl``."""
        waits = self.data_seconds
        return {
            "rank_seconds_min": min(self.rank_seconds),
            "rank_seconds_median": self.median,
            "rank_seconds_max": max(self.rank_seconds),
            "slowest_rank": self.slowest,
            "data_seconds_max": max(waits),
            "slowest_data_rank": max(range(len(waits)), key=waits.__getitem__),
        }


class StragglerMonitor:
    """Compares the ranks after every so many steps, and says once that one has become slow.

    Args:
        topology: The place of this process.
        every_steps: Steps of a window.
        last_step: Of the run, which ends a window too.
    """

    def __init__(self, topology: Topology, every_steps: int, last_step: int) -> None:
        self._topology = topology
        self._every, self._last = every_steps, last_step
        self._seconds: list[tuple[float, float]] = []
        self._known_slow: int | None = None

    def observe(self, step: int, clock: StepClock) -> tuple[dict[str, float | int], str]:
        """After step ``step``, counted from 1. A collective at the end of a window.

        Returns:
            Its metrics, and a warning; both empty within a window and for a job of one process.
        """
        self._seconds.append(clock.take())
        if step % self._every and step != self._last:
            return {}, ""
        columns = zip(*self._seconds, strict=True)
        own = [statistics.median(column) for column in columns]
        count = len(self._seconds)
        self._seconds = []
        if self._topology.world_size == 1:
            return {}, ""
        window = _gather(own, self._topology)
        slow, known = window.slow_rank, self._known_slow
        self._known_slow = slow
        words = ""
        if slow is not None and slow != known:
            words = f"warning: step {step}: {self._describe(slow, window, count)}"
        return window.metrics(), words

    def _describe(self, slow: int, window: Window, count: int) -> str:
        """A collective: the slow rank tells the others where it runs."""
        topology = self._topology
        own = (socket.gethostname(), platform.device_name(), topology.data_rank)
        host, device, data_rank = broadcast(own, source=slow)
        where = f"{host}, {device}" if device else str(host)
        if topology.data_size < topology.world_size:
            where += f", or another rank of data-parallel rank {data_rank}"
        most, median = window.rank_seconds[slow], window.median
        return (
            f"rank {slow} ({where}) is slow: over {count} steps it took {most:.3f} s before it "
            f"waits for others, {most / median:.1f} times the median of {median:.3f} s. All ranks "
            "wait for it: look at its temperature, clock and neighbours (docs/stability.md)"
        )


def _gather(own: Sequence[float], topology: Topology) -> Window:
    numbers = torch.tensor(own, dtype=torch.float64, device=platform.device())
    everywhere = [torch.empty_like(numbers) for _ in range(topology.world_size)]
    torch.distributed.all_gather(everywhere, numbers)
    rows = torch.stack(everywhere).T.tolist()
    return Window(rows[0], rows[1])


def _now() -> Any:
    if not platform.has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
