"""The checkpoints and the abandoned branches of a run; no tensor is read."""

import datetime
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    list_step_folders,
    load_state,
    step_of,
)
from megatron_chameleon.checkpoint.state.line import (
    BRANCH_FILE,
    last_metrics_step,
    list_branches,
    list_line,
)
from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.files import read_json_object

FOLDER = "checkpoints"
_MOST_FILES = 100_000
"""Of one checkpoint, whose sizes are added up."""


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of the current line."""

    step: int
    path: Path
    is_whole: bool
    """Whether it has ``state.json``, which is written last."""
    saved: datetime.datetime | None
    """When it was complete, in UTC; None if it is not."""

    def state(self) -> dict[str, Any]:
        """Its ``state.json``; empty if that is missing or damaged."""
        try:
            return load_state(self.path)
        except ChameleonError:
            return {}

    def size_bytes(self) -> int:
        """The sum of its files."""
        return sum(_sizes(self.path))


@dataclass(frozen=True)
class RunBranch:
    """What a run did after a step and abandoned by going back to that step."""

    path: Path
    after_step: int | None
    """The last step that both share; None if nobody knows."""
    last_step: int | None
    """Of its metrics or checkpoints."""
    since: str
    """When it was set aside, as local time; empty if nobody knows."""
    checkpoint_steps: list[int]

    @property
    def name(self) -> str:
        return self.path.name


def list_checkpoints(run: Path, problems: list[str]) -> list[RunCheckpoint]:
    """The checkpoints of a run's current line, whole or not, by step.

    Args:
        run: The run folder.
        problems: Takes a sentence about what cannot be read.
    """
    folder = run / FOLDER
    try:
        found = list_line(folder, whole=False)
    except ChameleonError as error:
        problems.append(str(error))
        found = _or_none(folder, problems)
    except OSError:
        found = _or_none(folder, problems)
    return [_checkpoint(path) for path in sorted(found, key=step_of)]


def best_checkpoint(run: Path) -> RunCheckpoint:
    """The whole checkpoint of a run with the lowest held-out loss; of equal ones the first.

    Where no held-out loss was measured, it is the newest one.

    Raises:
        DataError: The run has no whole checkpoint.
    """
    problems: list[str] = []
    whole = [checkpoint for checkpoint in list_checkpoints(run, problems) if checkpoint.is_whole]
    if not whole:
        what = "has no whole checkpoint"
        raise DataError(str(run), what, "Train until the first one is saved")
    losses = {c.step: loss for c in whole if (loss := _held_out_loss(c)) is not None}
    return min(whole, key=lambda c: losses.get(c.step, math.inf)) if losses else whole[-1]


def _held_out_loss(checkpoint: RunCheckpoint) -> float | None:
    loss = checkpoint.state().get("validation_loss")
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        return None
    return loss if math.isfinite(loss) else None


def list_run_branches(run: Path, problems: list[str]) -> list[RunBranch]:
    """The branches that a run has abandoned, in the order in which that was done."""
    try:
        return [_branch(path) for path in list_branches(run / FOLDER)]
    except OSError as error:
        problems.append(f"{run / FOLDER} cannot be read ({error.strerror})")
        return []


def _or_none(folder: Path, problems: list[str]) -> list[Path]:
    try:
        return list_step_folders(folder)
    except OSError as error:
        problems.append(f"{folder} cannot be read ({error.strerror})")
        return []


def _checkpoint(path: Path) -> RunCheckpoint:
    saved = None
    with suppress(OSError, ValueError, OverflowError):
        saved = datetime.datetime.fromtimestamp((path / STATE_FILE).stat().st_mtime, datetime.UTC)
    return RunCheckpoint(step_of(path), path, saved is not None, saved)


def _branch(path: Path) -> RunBranch:
    values: dict[str, Any] = {}
    with suppress(ChameleonError):
        values = read_json_object(path / BRANCH_FILE)
    after = values.get("after_step")
    steps = [step_of(folder) for folder in list_step_folders(path)]
    last = max([*steps, last_metrics_step(path) or 0])
    since = values.get("since")
    return RunBranch(
        path=path,
        after_step=after if type(after) is int and after >= 0 else None,
        last_step=last or None,
        since=since[:99] if isinstance(since, str) else "",
        checkpoint_steps=steps,
    )


def _sizes(folder: Path) -> Iterator[int]:
    """The size of each file below a folder; links are not followed."""
    seen = 0
    for place, _, names in os.walk(folder):
        for name in names:
            seen += 1
            if seen > _MOST_FILES:
                return
            with suppress(OSError):
                yield (Path(place) / name).lstat().st_size
