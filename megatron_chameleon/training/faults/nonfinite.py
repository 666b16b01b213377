"""Act on a loss or a gradient that is not finite, as ``training.nonfinite`` says.

Both engines see it before the update, by the loss and by the norm of the gradients, which every
step computes anyway, and leave the update out. The guard then lets ``nonfinite_origin.py`` look for
the cause, records it in ``nonfinite.jsonl``, and stops the run, skips the step or rolls back.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import load_state, step_of
from megatron_chameleon.checkpoint.state.line import list_line
from megatron_chameleon.checkpoint.state.start import find_newest_sound
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.errors import ChameleonError, TrainingError
from megatron_chameleon.parallel.collectives import run_on_rank_0
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.faults.nonfinite_origin import (
    RankFindings,
    describe_findings,
    find_origin,
    first_bad_layer,
    list_suspect_samples,
)
from megatron_chameleon.training.faults.weights import name_broken_weights
from megatron_chameleon.training.records.growing_file import GrowingFile, cut_broken_end
from megatron_chameleon.training.run.folder import checkpoints_folder
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.skipped_steps import NONFINITE_FILE, Outcome


class Rollback(Exception):
    """The run is to go back to a checkpoint; raised on every rank."""

    def __init__(self, checkpoint: Path, text: str) -> None:
        super().__init__(text)
        self.checkpoint = checkpoint


class NonFiniteGuard:
    """Checks the values of each step, on every rank.

    Args:
        inputs: The run's. Steps that are not finite are added to its ``skipped_steps``.
        engine: The run's.
        topology: The place of this process.
        finish_saves: Waits until no checkpoint is being written; called before a rollback.
        say: Takes a line for the user.
        warn: Takes a warning for the user.
        record: Takes an event, its text and its step.
    """

    def __init__(
        self,
        inputs: RunInputs,
        engine: TrainingEngine,
        topology: Topology,
        *,
        finish_saves: Callable[[], None],
        say: Callable[[str], None],
        warn: Callable[[str], None],
        record: Callable[[str, str, int], None],
    ) -> None:
        self._inputs, self._engine, self._topology = inputs, engine, topology
        self._skipped = inputs.skipped_steps
        self._training = inputs.config.training
        self._finish_saves, self._say, self._warn = finish_saves, say, warn
        self._record_event = record

    def check(
        self,
        step: int,
        metrics: Mapping[str, Any],
        micro_batches: Sequence[Batch],
        *,
        before_save: bool,
    ) -> None:
        """Check the values of the step that the engine has just done.

        A collective; every rank comes to the same result.

        Args:
            step: Counted from 1.
            metrics: Those of the step.
            micro_batches: Those of the step.
            before_save: Whether a checkpoint follows. The weights are then checked too.

        Raises:
            TrainingError: The run must stop.
            Rollback: It is to continue from a checkpoint.
        """
        is_skipped = metrics.get("skipped", False)
        if is_skipped:
            self._skipped.done.add(step)
            if step in self._skipped:
                reason = "training.skip_steps lists it"
                if step not in self._skipped.configured:
                    reason = "it was not finite before"
                text = f"step {step}: its update was left out, because {reason}"
                self._say(text)
                self._record_event("skip", text, step)
                return
        # A step in which no label counts has no loss: None is not a fault.
        values = {name: metrics[name] for name in ("loss", "grad_norm")}
        bad = [name for name, value in values.items() if not math.isfinite(value or 0.0)]
        if bad:
            problem = f"{bad[0]} is {values[bad[0]]}"
            if not is_skipped:
                raise stop_error(step, problem)
            self._handle(step, problem, metrics, micro_batches)
        elif before_save:
            self.check_weights(step)

    def check_weights(self, step: int) -> None:
        """Refuse to go on with weights that are not finite. A collective.

        Raises:
            TrainingError: It names them.
        """
        if names := name_broken_weights(self._engine.named_parameters()):
            raise stop_error(step, f"weights not finite: {names}")

    def _handle(
        self,
        step: int,
        problem: str,
        metrics: Mapping[str, Any],
        micro_batches: Sequence[Batch],
    ) -> None:
        """Find the origin, record it, and do what the config says."""
        findings = find_origin(step, self._engine, micro_batches, self._topology)
        outcome, checkpoint = self._decide(step, findings)
        layer = first_bad_layer(metrics["layer_output_norms"])
        # No rank ends before rank 0 has written: the launcher would end rank 0 too.
        text = run_on_rank_0(lambda: self._record(step, problem, outcome, layer, findings))
        found, limit = sorted(self._skipped.found), self._training.nonfinite_limit
        if not outcome.leaves_out:
            raise stop_error(step, text, outcome, found, limit)
        self._skipped.found.add(step)
        count = f"{len(found) + 1} of at most {limit}"
        if checkpoint is None:
            text = f"step {step}: {text}; its update was left out ({count})"
            self._warn(text)
            self._record_event("skip", text, step)
            return
        raise Rollback(
            checkpoint,
            f"step {step}: {text}; the run goes back to {checkpoint} and leaves this step "
            f"out ({count})",
        )

    def _decide(self, step: int, findings: Sequence[RankFindings]) -> tuple[Outcome, Path | None]:
        """What becomes of the step, and the checkpoint to go back to. A collective."""
        policy = self._training.nonfinite
        if policy == "stop":
            return Outcome.STOP, None
        if len(self._skipped.found) >= self._training.nonfinite_limit:
            return Outcome.LIMIT_REACHED, None
        if policy == "skip":
            has_broken_weights = any(finding.weights for finding in findings)
            return Outcome.BROKEN_WEIGHTS if has_broken_weights else Outcome.SKIP, None
        self._finish_saves()
        found = run_on_rank_0(lambda: list_rollback_checkpoints(step, self._inputs))
        checkpoint, _ = find_newest_sound(found)
        return Outcome.ROLLBACK if checkpoint else Outcome.NO_CHECKPOINT, checkpoint

    def _record(
        self,
        step: int,
        problem: str,
        outcome: Outcome,
        layer: str | None,
        findings: Sequence[RankFindings],
    ) -> str:
        """Rank 0: append a line to ``nonfinite.jsonl``; returns the same in words."""
        path = Path(self._inputs.config.logging.run_dir) / NONFINITE_FILE
        samples: list[dict[str, Any]] = []
        try:  # the other ranks wait for this one, whatever goes wrong here
            reader = self._inputs.reader_after(step - 1)
            samples = list_suspect_samples(step, reader, findings, self._topology.data_size)
            record = {
                "step": step,
                "problem": problem,
                "action": outcome.value,
                "first_bad_layer": layer,
                "time": time.time(),
                "ranks": [asdict(f) for f in findings if f.micro_batches or f.weights],
                "samples": samples,
            }
            cut_broken_end(path)
            with closing(GrowingFile(path)) as file:
                file.append((json.dumps(record) + "\n").encode())
                file.flush_to_disk()
            place = f"documents in {path}"
        except TrainingError as error:
            place = f"{error.where} {error.what}"
        except (ChameleonError, OSError) as error:
            place = f"{path} could not be written: {error}"
        return describe_findings(problem, layer, findings, samples, place)


def list_rollback_checkpoints(step: int, inputs: RunInputs) -> list[Path]:
    """The checkpoints of this run's line from before a step, the newest first.

    Args:
        step: The one that is not finite, counted from 1.
        inputs: The run's.
    """
    start = inputs.checkpoint
    state = load_state(start) if start is not None else {}
    if state.get("optimizer") is False:  # bare weights have no moments to go back to
        start, state = None, {}
    # What this run has saved since: it may have started from elsewhere.
    steps = range(state.get("step", 0) + 1, step)
    saved = list_line(checkpoints_folder(inputs.config))
    found = [path for path in reversed(saved) if step_of(path) in steps]
    return found + ([start] if start else [])


def stop_error(
    step: int,
    problem: str,
    outcome: Outcome = Outcome.STOP,
    left_out: Sequence[int] = (),
    limit: int = 0,
) -> TrainingError:
    """Why a run stops, and what to do.

    Args:
        step: Counted from 1.
        problem: What was found.
        outcome: One after which the run stops.
        left_out: Steps that were left out before because they were not finite.
        limit: How many may be left out.
    """
    look = "look at output_norm and max_logit in metrics.jsonl before this step"
    reason = ""
    remedy = f"Resume from the last checkpoint with a lower optimizer.lr, and {look}"
    match outcome:
        case Outcome.LIMIT_REACHED:
            count = f"{len(left_out)} step{'s were' if len(left_out) != 1 else ' was'}"
            numbers = f" ({', '.join(map(str, left_out))})" if left_out else ""
            reason = f"; {count} left out before{numbers}, and training.nonfinite_limit is {limit}"
            remedy = (
                f"Resume from a checkpoint before step {min(left_out, default=step)} with a lower "
                f"optimizer.lr, or raise training.nonfinite_limit, and {look}"
            )
        case Outcome.BROKEN_WEIGHTS:
            reason = "; leaving out the update cannot repair the weights"
            remedy = "Run the same command to resume from the last checkpoint"
        case Outcome.NO_CHECKPOINT:
            reason = "; there is no checkpoint to go back to"
            remedy = (
                f"Start again with training.skip_steps=[{step}], and save more often "
                "(checkpoint.every_steps)"
            )
    return TrainingError(f"step {step}", f"{problem}{reason}", remedy)
