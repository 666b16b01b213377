"""Raise an alarm when the last layer's output norm grows, long before the loss diverges.

The paper (section 2.3, figure 5a) shows this growth over 30,000 steps: from 2.5 to 5 in a stable
run, from 4 to 25 without dropout, and from 6 to 35 without QK-norm and dropout. The last two
diverged later. What counts is the growth, not the norm itself, which depends on the model's size.
While a model still learns fast, its norms grow for good reasons, so growth is measured from the
point where the loss falls more slowly. This is plain arithmetic on metrics that every step has;
nothing here imports torch.
"""

import math
from dataclasses import dataclass
from statistics import median

DRIFT = 2.5
"""Growth, since the loss stopped falling fast, that raises the alarm. In the paper, a stable run
grew 2-fold, and those that diverged 6-fold."""
BURST = 3.0
"""Growth within the second half of the steps so far that raises the alarm at any time."""
FAST_FALL = 0.9
"""The loss falls fast if it is below this share of what it was after half of the steps."""
FIRST_STEP = 50
"""No alarm is raised before this step, because everything changes fast."""
WINDOW = 0.1
"""Medians are taken over the last steps, this share of all steps so far."""


@dataclass(frozen=True)
class Alarm:
    """What was seen when the alarm was raised."""

    step: int
    output_norm: float
    since_step: int
    since_output_norm: float
    loss: float
    since_loss: float

    def __str__(self) -> str:
        growth = self.output_norm / self.since_output_norm
        return (
            f"step {self.step}: the last layer's output norm grew {growth:.1f}-fold, from "
            f"{self.since_output_norm:.4g} at step {self.since_step} to {self.output_norm:.4g}, "
            f"while the loss went from {self.since_loss:.4g} to {self.loss:.4g}"
        )


@dataclass(frozen=True)
class _Level:
    """Medians around a step."""

    step: int
    norm: float
    loss: float


class DivergenceAlarm:
    """Watches the output norm and the loss of every step.

    It needs the steps in order, including those before a resume, so that a restart changes
    nothing.
    """

    def __init__(self) -> None:
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._first_step: int | None = None
        self._reference: _Level | None = None
        self._last_alarm_step = 0

    def observe(self, step: int, output_norm: float | None, loss: float | None) -> Alarm | None:
        """Take in a step; returns the alarm if this step raises it.

        After an alarm, the next one needs the same growth again.

        Args:
            step: Counted from 1; one more each time.
            output_norm: As in ``metrics.jsonl``. None, or a value that is not finite, counts as
                the one before.
            loss: Likewise.
        """
        if self._first_step is None:
            self._first_step = step
        self._norms.append(_finite(output_norm, self._norms))
        self._losses.append(_finite(loss, self._losses))
        seen = len(self._norms)
        if seen < FIRST_STEP or seen % max(1, seen // 100):
            return None
        now, half = self._level(seen), self._level(seen // 2)
        if self._reference is None or now.loss < FAST_FALL * half.loss:
            self._reference = now
        before = self._level(seen - max(1, int(WINDOW * seen)))
        bursts = now.norm >= BURST * half.norm and half.step > self._last_alarm_step
        since = half if bursts else self._reference
        if now.norm < before.norm or not (bursts or now.norm >= DRIFT * since.norm):
            return None
        self._reference, self._last_alarm_step = now, step
        return Alarm(step, now.norm, since.step, since.norm, now.loss, since.loss)

    def _level(self, seen: int) -> _Level:
        """Medians over the last steps of the first ``seen``."""
        assert self._first_step is not None
        begin = seen - max(5, int(WINDOW * seen))
        place = slice(max(0, begin), seen)
        step = self._first_step + seen - 1
        return _Level(step, median(self._norms[place]), median(self._losses[place]))


def _finite(value: float | None, before: list[float]) -> float:
    if value is not None and math.isfinite(value):
        return value
    return before[-1] if before else 0.0
