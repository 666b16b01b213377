"""What stands at the top of a report: the sentences that the owner of a run must read."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.runs.metrics import Metrics
from megatron_chameleon.runs.run import RunRecord
from megatron_chameleon.runs.turning import has_risen
from megatron_chameleon.wording import counted

HELD_OUT = {
    "validation/loss": "held-out loss",
    "validation/loss_text": "held-out text loss",
    "validation/loss_image": "held-out image loss",
}
_MOST_PROBLEMS = 20
_BAD_ENDS = {"error": "an error", "hang": "a hang"}


@dataclass(frozen=True)
class HeldOut:
    """Where a held-out loss was lowest, and where it stands."""

    lowest_step: int
    lowest: float
    last_step: int
    last: float
    measurements: int
    has_risen: bool
    """Whether it lies clearly above its lowest value, and has for some measurements."""


def held_out(metrics: Metrics, key: str = "validation/loss") -> HeldOut | None:
    """How a held-out loss went; None if it was never measured."""
    steps, values = metrics.finite(key)
    if not len(steps):
        return None
    # The last of equal values, so that a constant loss does not count as having turned.
    lowest = len(values) - 1 - int(np.argmin(values[::-1]))
    return HeldOut(
        lowest_step=int(steps[lowest]),
        lowest=float(values[lowest]),
        last_step=int(steps[-1]),
        last=float(values[-1]),
        measurements=len(values),
        has_risen=has_risen(float(values[lowest]), float(values[-1]), len(values) - 1 - lowest),
    )


def headlines(run: RunRecord) -> list[tuple[str, str]]:
    """The sentences, each with its kind for ``pages.elements.notes``."""
    found = [*_progress(run), *_held_out(run), *_troubles(run)]
    problems = [(problem, "warn") for problem in run.problems[:_MOST_PROBLEMS]]
    if (more := len(run.problems) - _MOST_PROBLEMS) > 0:
        problems.append((f"{more:,} more files or lines could not be read.", "warn"))
    return [(mask_secrets(text), kind) for text, kind in [*found, *problems]]


def _progress(run: RunRecord) -> Iterator[tuple[str, str]]:
    last, planned = run.metrics.last_step, run.planned_steps
    if not len(run.metrics):
        yield "The run has no steps yet, or their metrics are gone.", "warn"
    elif planned is not None and last < planned:
        share = f"{100 * last / planned:.0f}%"
        yield f"The run stands at step {last:,} of {planned:,} ({share}).", ""
    else:
        yield f"The run has done {counted(last, 'step')}.", ""


def _held_out(run: RunRecord) -> Iterator[tuple[str, str]]:
    told: set[int] = set()
    for key, name in HELD_OUT.items():
        found = held_out(run.metrics, key)
        if found is None or found.lowest_step in told:  # a modality that turned with all tokens
            continue
        if found.has_risen:
            told.add(found.lowest_step)
            text = (
                f"{name.capitalize()} is lowest at step {found.lowest_step:,} ({found.lowest:.4f}) "
                f"and has risen since, to {found.last:.4f} at step {found.last_step:,}"
            )
            falls = _falls(run.metrics, key, found)
            heart = ", while training loss fell: since then it has learned documents by heart"
            yield f"{text}{heart if falls else ''}.", "bad"
        elif key == "validation/loss":
            where = f"lowest at step {found.lowest_step:,} ({found.lowest:.4f})"
            if found.lowest_step == found.last_step:
                where = f"{found.last:.4f} at step {found.last_step:,}, the lowest so far"
            yield f"Held-out loss is {where}.", ""
    if len(run.metrics) and held_out(run.metrics) is None:
        yield "No held-out loss was measured.", ""


def _falls(metrics: Metrics, key: str, found: HeldOut) -> bool:
    """Whether the training loss around the last measurement is below that around the lowest."""
    steps, values = metrics.finite(key.removeprefix("validation/"))
    width = max((found.last_step - found.lowest_step) // 2, 1)

    def mean(end: int) -> float:
        near = values[(steps > end - width) & (steps <= end)]
        return float(near.mean()) if len(near) else np.nan

    return mean(found.last_step) < mean(found.lowest_step)


def _troubles(run: RunRecord) -> Iterator[tuple[str, str]]:
    alarms = run.alarms.alarms
    if alarms:
        count = counted(len(alarms) + run.alarms.left_out, "divergence alarm")
        yield f"{count}, the last at step {alarms[-1]['step']:,}.", "bad"
    kinds = [event.kind for event in run.events.events]
    restarts = kinds.count("restart")
    if restarts:
        yield f"The run was restarted {_times(restarts)}.", ""
    if skipped := kinds.count("skip"):
        yield f"The updates of {counted(skipped, 'step')} were left out.", "warn"
    if run.events.events and (last := run.events.events[-1]).kind in _BAD_ENDS:
        yield f"Its last event is {_BAD_ENDS[last.kind]}: {last.text}", "bad"
    if rollbacks := kinds.count("rollback"):
        yield f"It was rolled back to an earlier checkpoint {_times(rollbacks)}.", "warn"
    if run.branches:
        yield f"{counted(len(run.branches), 'abandoned branch', 'es')}.", ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
