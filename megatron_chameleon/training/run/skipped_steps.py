"""The steps of a run that make no update: listed in the config, or found not finite.

A checkpoint keeps them under ``skipped_steps`` in its ``state.json``; ``nonfinite.jsonl`` in the
run folder holds those that were found since. So a run that is resumed, or replayed after a
rollback, leaves out the same steps again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.training.records.growing_file import read_json_lines

NONFINITE_FILE = "nonfinite.jsonl"


class Outcome(Enum):
    """What became of a step that was not finite; the value is its ``action`` in the file."""

    SKIP = "skip"
    """Its update was left out, and the run continues."""
    ROLLBACK = "rollback"
    """The run goes back to a checkpoint, and leaves the step out when it comes again."""
    STOP = "stop"
    """The run ends, because the config says so."""
    LIMIT_REACHED = "limit"
    """The run ends: ``training.nonfinite_limit`` steps have been left out already."""
    BROKEN_WEIGHTS = "broken weights"
    """The run ends: weights are not finite, and leaving out an update does not repair them."""
    NO_CHECKPOINT = "no checkpoint"
    """The run ends: it should roll back, but it has no checkpoint yet."""

    @property
    def leaves_out(self) -> bool:
        """Whether the run continues without the step."""
        return self in (Outcome.SKIP, Outcome.ROLLBACK)


@dataclass
class SkippedSteps:
    """The steps, counted from 1, that make no update."""

    configured: frozenset[int] = frozenset()
    """Those of ``training.skip_steps``."""
    found: set[int] = field(default_factory=set)
    """Those that were not finite, over the whole run."""
    done: set[int] = field(default_factory=set)
    """Those that were left out so far."""

    def __contains__(self, step: int) -> bool:
        """Whether the step's update is to be left out."""
        return step in self.configured or step in self.found

    def rewind(self, steps_done: int) -> None:
        """Forget which steps after ``steps_done`` were left out: they will be done again."""
        self.done = {step for step in self.done if step <= steps_done}

    def count_updates(self, step: int) -> int:
        """Updates among the first ``step`` steps."""
        return step - len(self.done)

    def to_save(self) -> list[int]:
        """The entry of ``state.json``: steps that were left out, and those that will be."""
        return sorted(self.done | self.found)


def find_skipped_steps(config: Config, checkpoint: Path | None) -> SkippedSteps:
    """The skipped steps of a run that begins, or that is resumed from a checkpoint.

    Args:
        config: A checked config.
        checkpoint: A whole one, or None.

    Raises:
        CheckpointError: The checkpoint's list is damaged.
        DataError: ``nonfinite.jsonl`` is damaged.
    """
    configured = frozenset(config.training.skip_steps)
    if checkpoint is None:
        return SkippedSteps(configured)
    state = load_state(checkpoint)
    if state.get("optimizer") is False:  # bare weights: a new run begins
        return SkippedSteps(configured)
    saved = set(_saved_steps(state, checkpoint))
    logged = _logged_steps(Path(config.logging.run_dir) / NONFINITE_FILE)
    done = {step for step in saved if step <= state["step"]}
    return SkippedSteps(configured, (saved | logged) - configured, done)


def count_updates(checkpoint: Path, step: int) -> int:
    """Updates before a checkpoint: AdamW's step, which its bias correction needs.

    Args:
        checkpoint: A whole one.
        step: Its step, which counts steps without an update too.

    Raises:
        CheckpointError: The list of skipped steps is damaged.
    """
    saved = _saved_steps(load_state(checkpoint), checkpoint)
    return step - sum(1 for skipped in saved if skipped <= step)


def _saved_steps(state: Mapping[str, Any], checkpoint: Path) -> list[int]:
    steps = state.get("skipped_steps") or []
    if not isinstance(steps, list) or not all(type(step) is int and step > 0 for step in steps):
        what = f"skipped_steps in its state.json is {steps!r}, which is not a list of steps"
        raise CheckpointError(str(checkpoint), what, "Use another checkpoint")
    return steps


def _logged_steps(path: Path) -> set[int]:
    """The steps that ``nonfinite.jsonl`` says were left out."""
    left_out = [outcome.value for outcome in Outcome if outcome.leaves_out]
    lines = read_json_lines(path, ("step", "action"))
    return {record["step"] for record, _ in lines if record["action"] in left_out}
