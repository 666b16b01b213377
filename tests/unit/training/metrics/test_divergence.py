"""The alarm on curves with the paper's figures (section 2.3, figure 5a), in several shapes."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from megatron_chameleon.training.metrics.divergence import Alarm, DivergenceAlarm

STEPS = 30_000
FIGURES = {
    "stable": (2.5, 5.0),
    "without dropout": (4.0, 25.0),
    "without QK-norm and dropout": (6.0, 35.0),
}
SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "straight": lambda a, b, x: a + (b - a) * x,
    "exponential": lambda a, b, x: a * (b / a) ** x,
    "flattening": lambda a, b, x: a + (b - a) * math.sqrt(x),
}


def loss_at(step: int) -> float:
    """A power law from 10.7 to about 1.95 over 30,000 steps."""
    return 1.7 + 9 * (step + 1) ** -0.35


def alarms(norm: Callable[[float], float], noise: float = 0.05, steps: int = STEPS) -> list[Alarm]:
    draw = random.Random(1)
    alarm, found = DivergenceAlarm(), []
    for step in range(1, steps + 1):
        value = norm(step / steps) * draw.gauss(1, noise)
        found.append(alarm.observe(step, value, loss_at(step) * draw.gauss(1, 0.02)))
    return [entry for entry in found if entry is not None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", FIGURES)
def test_the_figures_of_the_paper(run: str, shape: str) -> None:
    found = alarms(lambda x: SHAPES[shape](*FIGURES[run], x))
    if run == "stable":
        assert found == []
    else:  # The paper's runs diverged after 20% of an epoch, ten times as many steps.
        assert found and found[0].step < 0.6 * STEPS
        assert 2.2 < found[0].output_norm / found[0].since_output_norm < 3.5


def test_what_the_alarm_says() -> None:
    first = alarms(lambda x: 4 * 6.25**x, noise=0.0)[0]
    words = f"step {first.step}: the last layer's output norm grew 2.5-fold, from "
    assert str(first).startswith(words)
    assert f"at step {first.since_step} to" in str(first)


def test_the_next_alarm_needs_the_same_growth_again() -> None:
    found = alarms(lambda x: 4 * 100**x, noise=0.0)
    assert 3 <= len(found) <= 5
    for one, other in itertools.pairwise(found):
        assert other.output_norm > 2.4 * one.output_norm


def test_growth_while_the_loss_falls_fast_is_learning() -> None:
    """A small model's first steps: the norm grows fivefold, the loss falls from 6 to 1.5."""
    alarm = DivergenceAlarm()
    for step in range(1, 1001):
        norm = 20 - 16 * math.exp(-step / 60)
        assert alarm.observe(step, norm, 1.5 + 4.5 * math.exp(-step / 80)) is None


def test_a_burst_is_an_alarm_at_any_time() -> None:
    alarm = DivergenceAlarm()
    found = [alarm.observe(step, 1.02**step, 5 - 0.02 * step) for step in range(1, 201)]
    raised = [entry.step for entry in found if entry]
    assert raised and raised[0] <= 120


def test_a_norm_that_falls_back_raises_nothing() -> None:
    assert alarms(lambda x: 4 + 20 * math.exp(-x * 50)) == []


def test_missing_and_infinite_values_do_no_harm() -> None:
    alarm = DivergenceAlarm()
    for step in range(1, 200):
        value = None if step % 3 == 0 else math.nan if step % 5 == 0 else 3.0
        assert alarm.observe(step, value, math.inf if step % 7 == 0 else 2.0) is None
