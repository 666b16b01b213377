"""Find the rank that is slow: in a synchronous run, every step takes as long as the slowest rank.

So a rank's time is measured as long as it has not waited for other data-parallel ranks: from the
start of a step until just before gradients are reduced. How long it waits for its data is measured
separately. The ranks of a tensor-parallel or pipeline group wait for each other within that time,
so such a group is slow as a whole.
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
"""A rank is called slow from this many times the median of the ranks."""
SMALLEST_SECONDS = 0.05
"""A rank that is slower by less than this is not called slow."""


class StepClock:
    """Measures what a rank does in a step before it waits. On a GPU, events do it without a wait.

    Attributes:
        phase: What the engine is doing, in words.
        data_seconds: How long the rank has waited for its data since the last ``take``.
    """

    def __init__(self) -> None:
        self.phase = "between steps"
        self.data_seconds = 0.0
        self._parts: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def start(self) -> None:
        """Note that a part of the step begins whose time counts."""
        self.phase = "forward and backward"
        self._begin = _now()

    def stop(self, phase: str = "gradient reduction and update") -> None:
        """Note that it has ended, and that what follows may wait for other ranks."""
        self.phase = phase
        if self._begin is not None:
            self._parts.append((self._begin, _now()))
            self._begin = None

    def take(self) -> tuple[float, float]:
        """Seconds of all parts, and of waiting for data, since the last call.

        On a GPU it waits for the last part, which has ended once the gradient norm is known.
        """
        parts, self._parts = self._parts, []
        waited, self.data_seconds = self.data_seconds, 0.0
        return sum(_between(begin, end) for begin, end in parts), waited


@dataclass(frozen=True)
class RankTimes:
    """How long each rank took per step: medians over some steps, in the order of the ranks."""

    rank_seconds: Sequence[float]
    data_seconds: Sequence[float]

    @property
    def slowest(self) -> int:
        return max(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)

    @property
    def median(self) -> float:
        """The lower median: of two ranks the faster one, so that the other can stand out."""
        return statistics.median_low(self.rank_seconds)

    @property
    def slow_rank(self) -> int | None:
        """The slowest rank if it is far behind the others, otherwise None."""
        most = self.rank_seconds[self.slowest]
        is_slow = most > SLOW * self.median and most - self.median > SMALLEST_SECONDS
        return self.slowest if is_slow else None

    def metrics(self) -> dict[str, float | int]:
        """The entries of ``metrics.jsonl``."""
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
    """Compares the ranks every few steps, and reports once when one has become slow.

    Args:
        topology: The place of this process.
        every_steps: How many steps lie between two comparisons.
        last_step: The last step of the run, after which the ranks are compared too.
    """

    def __init__(self, topology: Topology, every_steps: int, last_step: int) -> None:
        self._topology = topology
        self._every, self._last = every_steps, last_step
        self._seconds: list[tuple[float, float]] = []
        self._known_slow: int | None = None

    def observe(self, step: int, clock: StepClock) -> tuple[dict[str, float | int], str]:
        """Take in a step, and compare the ranks if it is time. A comparison is a collective.

        Args:
            step: The step that was just done, counted from 1.
            clock: The engine's.

        Returns:
            Metrics and a warning. Both are empty without a comparison, and for a single process.
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
        times = gather_rank_times(own, self._topology)
        slow, known = times.slow_rank, self._known_slow
        self._known_slow = slow
        warning = ""
        if slow is not None and slow != known:
            warning = f"step {step}: {self._describe_slow_rank(slow, times, count)}"
        return times.metrics(), warning

    def _describe_slow_rank(self, slow: int, times: RankTimes, count: int) -> str:
        """A warning about a slow rank. A collective: the rank tells the others where it runs."""
        topology = self._topology
        own = (socket.gethostname(), platform.device_name(), topology.data_rank)
        host, device, data_rank = broadcast(own, source=slow)
        where = f"{host}, {device}" if device else str(host)
        if topology.data_size < topology.world_size:
            where += f", or another rank of data-parallel rank {data_rank}"
        most, median = times.rank_seconds[slow], times.median
        return (
            f"rank {slow} ({where}) is slow: over {count} steps it took {most:.3f} s before it "
            f"waits for others, {most / median:.1f} times the median of {median:.3f} s. All ranks "
            "wait for it, so look at its temperature, clock and neighbours (docs/stability.md)"
        )


def gather_rank_times(own: Sequence[float], topology: Topology) -> RankTimes:
    """The times of all ranks. A collective.

    Args:
        own: This rank's seconds per step, and its seconds of waiting for data.
        topology: The place of this process.
    """
    numbers = torch.tensor(own, dtype=torch.float64, device=platform.device())
    everywhere = [torch.empty_like(numbers) for _ in range(topology.world_size)]
    torch.distributed.all_gather(everywhere, numbers)
    rows = torch.stack(everywhere).T.tolist()
    return RankTimes(rows[0], rows[1])


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
