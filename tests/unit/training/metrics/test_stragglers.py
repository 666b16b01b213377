"""Which rank is called slow, for given times."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.metrics import stragglers
from megatron_chameleon.training.metrics.stragglers import RankTimes, StepClock, StragglerMonitor

pytestmark = pytest.mark.serial  # it times ranks


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 1.29, 0.9, 1.0], None),
        ([1.0, 1.0, 1.4, 1.0], 2),
        ([1.0, 1.4], 1),  # of two ranks, the faster one counts as the median
        ([1.5, 1.0], 0),
        ([1.0, 1.25], None),
        ([0.010, 0.020], None),  # too small a difference
        ([2.0, 2.0, 1.0, 1.0, 1.0], 0),
        ([1.0], None),
    ],
)
def test_who_is_slow(seconds: Sequence[float], slow: int | None) -> None:
    assert RankTimes(seconds, [0.0] * len(seconds)).slow_rank == slow


def test_metrics_of_the_ranks() -> None:
    assert RankTimes([1.0, 3.0, 2.0], [0.0, 0.1, 0.4]).metrics() == {
        "rank_seconds_min": 1.0,
        "rank_seconds_median": 2.0,
        "rank_seconds_max": 3.0,
        "slowest_rank": 1,
        "data_seconds_max": 0.4,
        "slowest_data_rank": 2,
    }


class FixedClock(StepClock):
    """Gives the times that it was made with."""

    def __init__(self, seconds: Sequence[float]) -> None:
        super().__init__()
        self.left = list(seconds)

    def take(self) -> tuple[float, float]:
        return self.left.pop(0), 0.0


def make_monitor(
    monkeypatch: pytest.MonkeyPatch, others: float, tensor_size: int = 1
) -> StragglerMonitor:
    """The monitor of rank 0 of four, with the given time of the others."""

    def gather(own: Sequence[float], topology: Topology) -> RankTimes:
        return RankTimes([own[0], others, others, others], [own[1], 0.0, 0.0, 0.0])

    monkeypatch.setattr(stragglers, "gather_rank_times", gather)
    monkeypatch.setattr(stragglers.torch.distributed, "broadcast_object_list", lambda *_, src: None)
    return StragglerMonitor(Topology(4, 0, 0, tensor_size, 0, 1, 0, 4 // tensor_size), 3, 100)


def observe(monitor: StragglerMonitor, seconds: Sequence[float]) -> list[tuple[int, str]]:
    clock = FixedClock(seconds)
    found = [monitor.observe(step, clock) for step in range(1, len(seconds) + 1)]
    return [(step, words) for step, (_, words) in enumerate(found, start=1) if words]


def test_a_slow_rank_is_named_once_until_it_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, well = [2.0] * 3, [1.0] * 3
    found = observe(make_monitor(monkeypatch, 1.0), [*slow, *slow, *well, *slow])
    assert [step for step, _ in found] == [3, 12]
    assert found[0][1].startswith("step 3: rank 0 (")
    assert (
        "over 3 steps it took 2.000 s before it waits for others, 2.0 times the median"
        in (found[0][1])
    )


def test_one_long_step_does_not_make_a_rank_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert observe(make_monitor(monkeypatch, 1.0), [1.0, 60.0, 1.0, 1.0, 1.0, 60.0]) == []


def test_ranks_of_a_group_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, words),) = observe(make_monitor(monkeypatch, 1.0, tensor_size=2), [2.0] * 3)
    assert ", or another rank of data-parallel rank 0) is slow" in words


def test_a_single_process_has_nothing_to_compare() -> None:
    monitor = StragglerMonitor(Topology(1, 0, 0, 1, 0, 1, 0, 1), 1, 100)
    assert monitor.observe(1, FixedClock([1.0])) == ({}, "")


def test_the_clock_adds_up_its_parts() -> None:
    clock: Any = StepClock()
    for _ in range(2):
        clock.start()
        time.sleep(0.02)
        clock.stop("backward")
        time.sleep(0.05)
    clock.data_seconds += 0.5
    seconds, waited = clock.take()
    assert (0.04 < seconds < 0.09, waited, clock.phase) == (True, 0.5, "backward")
    assert clock.take() == (0, 0.0)
