"""Which steps of a run leave out their update: told by the config, or found not finite.

A checkpoint keeps them under ``skipped_steps`` in its ``state.json``, and ``nonfinite.jsonl`` of
the run folder has those that were found since. So a run that is resumed, or replayed after a
rollback, leaves out the same steps again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError, DataError

NONFINITE_FILE = "nonfinite.jsonl"
LEFT_OUT = ("skip", "rollback")
"""Actions of ``nonfinite.jsonl`` after which a step is left out."""


@dataclass
class SkippedSteps:
    """The steps, counted from 1, whose update is left out."""

    told: frozenset[int] = frozenset()
    """By ``training.skip_steps``."""
    found: set[int] = field(default_factory=set)
    """Not finite, in the whole run."""
    done: set[int] = field(default_factory=set)
    """Left out so far."""

    def is_due(self, step: int) -> bool:
        """Whether this step's update is to be left out."""
        return step in self.told or step in self.found

    def rewind(self, step: int) -> None:
        """Forget what was done after ``step`` updates; it will be done again."""
        self.done = {done for done in self.done if done <= step}

    def count_updates(self, step: int) -> int:
        """Updates among the first ``step`` steps."""
        return step - len(self.done)

    def to_save(self) -> list[int]:
        """For ``state.json``: what was left out, and what was found and comes again."""
        return sorted(self.done | self.found)


def open_skips(config: Config, checkpoint: Path | None) -> SkippedSteps:
    """The skipped steps of a run that begins, or goes on after a checkpoint.

    Args:
        config: A checked config.
        checkpoint: A whole one, or None.

    Raises:
        CheckpointError: The checkpoint's list is damaged.
        DataError: ``nonfinite.jsonl`` is.
    """
    told = frozenset(config.training.skip_steps)
    if checkpoint is None:
        return SkippedSteps(told)
    state = load_state(checkpoint)
    if state.get("optimizer") is False:  # weights alone: the run begins
        return SkippedSteps(told)
    saved = set(_saved_steps(state, checkpoint))
    logged = _logged_steps(Path(config.logging.run_dir) / NONFINITE_FILE)
    return SkippedSteps(
        told, (saved | logged) - told, {step for step in saved if step <= state["step"]}
    )


def count_updates(checkpoint: Path, step: int) -> int:
    """Updates behind a checkpoint: AdamW's step, which its bias correction needs.

    Args:
        checkpoint: A whole one.
        step: Its step, those without an update included.

    Raises:
        CheckpointError: The list of skipped steps is damaged.
    """
    saved = _saved_steps(load_state(checkpoint), checkpoint)
    return step - sum(1 for skipped in saved if skipped <= step)


def _saved_steps(state: Mapping[str, Any], checkpoint: Path) -> list[int]:
    steps = state.get("skipped_steps") or []
    if not isinstance(steps, list) or not all(type(step) is int and step > 0 for step in steps):
        what = f"skipped_steps in its state.json is {steps!r}, no list of steps"
        raise CheckpointError(str(checkpoint), what, "Use another step")
    return steps


def _logged_steps(path: Path) -> set[int]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = set()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step, action = int(record["step"]), record["action"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a crash cut it off
            what = "no line with step and action"
            raise DataError(f"{path}:{number}", what, "Mend or remove that line") from error
        if action in LEFT_OUT:
            found.add(step)
    return found
