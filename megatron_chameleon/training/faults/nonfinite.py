"""A loss or gradient that is not finite: find where it came from, and do what the config says.

Both engines find it before the update, by the loss and the gradients' norm, which every step
computes anyway. Only then is looked for its origin: the ranks do the step's forward and backward
passes again, with hooks that see each gradient before it is summed over the ranks. The batch and
the dropout masks are the same, so a fault of data or model shows again, on the ranks where it
arises; one that does not show again points at a machine.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.checkpoint.state.folders import list_checkpoints, load_state, step_of
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch, BatchReader
from megatron_chameleon.errors import ChameleonError, TrainingError
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.parallel.collectives import all_gather, broadcast
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.training.engines.base import TrainingEngine
from megatron_chameleon.training.faults.weights import describe_names, name_broken_weights
from megatron_chameleon.training.run.folder import checkpoints_folder
from megatron_chameleon.training.run.skipped_steps import NONFINITE_FILE, SkippedSteps

SHOWN_SAMPLES = 4


class Rollback(Exception):
    """The run is to go back to a checkpoint; raised on every rank."""

    def __init__(self, checkpoint: Path, words: str) -> None:
        super().__init__(words)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class RankFinding:
    """What one rank found."""

    rank: int
    data_rank: int
    host: str
    losses: list[int]
    """Its micro-batches, from 0, whose loss was not finite."""
    weights: list[str]
    """Its weights that are not finite."""
    gradients: dict[str, list[int]]
    """Its gradients that are not finite in the repeated pass, and in which micro-batches."""

    @property
    def micro_batches(self) -> set[int]:
        """Those to blame."""
        return set(self.losses) or {n for numbers in self.gradients.values() for n in numbers}


class NonFiniteGuard:
    """Watches the values of each step, on every rank.

    Args:
        config: A checked config.
        tokenizer: Of the data.
        reader: The run's; only its history is read.
        topology: The place of this process.
        skips: The run's, which it adds to.
        resume_from: The checkpoint that the process began with.
        finish_saves: Waits until no checkpoint is being written; called before a rollback.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        reader: BatchReader,
        topology: Topology,
        skips: SkippedSteps,
        resume_from: Path | None,
        finish_saves: Callable[[], None],
    ) -> None:
        self.skips = skips
        self._finish_saves = finish_saves
        self._config, self._tokenizer, self._reader = config, tokenizer, reader
        self._topology, self._resume_from = topology, resume_from

    def check(
        self,
        step: int,
        metrics: Mapping[str, Any],
        engine: TrainingEngine,
        micro_batches: Sequence[Batch],
        *,
        saves: bool,
    ) -> str:
        """Look at the values of a step, counted from 1. A collective, and all ranks find the same.

        Args:
            step: Just done.
            metrics: As the engine gave them.
            engine: Just after the step.
            micro_batches: The step's.
            saves: Whether a checkpoint follows, so that the weights are looked at too.

        Returns:
            What to tell the owner, if the step's update was left out; else nothing.

        Raises:
            TrainingError: The run must stop.
            Rollback: It is to go on from a checkpoint.
        """
        skipped = metrics.get("skipped", False)
        if skipped:
            self.skips.done.add(step)
            if self.skips.is_due(step):
                told = step in self.skips.told
                why = "as training.skip_steps says" if told else "as it was before"
                return f"step {step}: its update was left out, {why}"
        # a step without a label that counts has no loss, and nothing that could be wrong with it
        values = {name: metrics[name] for name in ("loss", "grad_norm")}
        bad = [name for name, value in values.items() if not math.isfinite(value or 0.0)]
        if not bad:
            broken = name_broken_weights(engine.named_parameters()) if saves else ""
            if broken:
                raise stop_error(step, f"weights not finite: {broken}")
            return ""
        problem = f"{bad[0]} is {values[bad[0]]}"
        if not skipped:
            raise stop_error(step, problem)
        return self._handle(step, problem, metrics, engine, micro_batches)

    def _handle(
        self,
        step: int,
        problem: str,
        metrics: Mapping[str, Any],
        engine: TrainingEngine,
        micro_batches: Sequence[Batch],
    ) -> str:
        training = self._config.training
        findings = _find(step, engine, micro_batches, self._topology)
        broken = any(finding.weights for finding in findings)
        action, target = training.nonfinite, None
        found = sorted(self.skips.found)
        if action != "stop" and len(found) >= training.nonfinite_limit:
            action = "limit"
        elif action == "skip" and broken:
            action = "broken weights"
        elif action == "rollback":
            self._finish_saves()
            target = self._newest_checkpoint(step)
            action = action if target else "no checkpoint"
        words = problem
        if self._topology.rank == 0:
            layer = _first_bad_layer(metrics["layer_output_norms"])
            record = {"step": step, "problem": problem, "action": action, "first_bad_layer": layer}
            words = self._write(record, findings)
        # nobody ends before rank 0 has written: a launcher would end it too
        words = broadcast(words)
        if action not in ("skip", "rollback"):
            raise stop_error(step, words, action, found, training.nonfinite_limit)
        self.skips.found.add(step)
        place = f"{len(found) + 1} of at most {training.nonfinite_limit}"
        if target is None:
            return f"warning: step {step}: {words}; its update was left out ({place})"
        text = f"warning: step {step}: {words}; back to {target}, and without this step ({place})"
        raise Rollback(target, text)

    def _write(self, record: Mapping[str, Any], findings: Sequence[RankFinding]) -> str:
        """Rank 0: the line of ``nonfinite.jsonl``, and the same in words."""
        path = Path(self._config.logging.run_dir) / NONFINITE_FILE
        samples = []
        try:  # the other ranks go on, whatever goes wrong here
            samples = self._samples(record["step"], findings)
            ranks = [asdict(f) for f in findings if f.micro_batches or f.weights]
            content = {**record, "time": time.time(), "ranks": ranks, "samples": samples}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
            place = f"documents in {path}"
        except (ChameleonError, OSError) as error:
            place = f"{path} could not be written: {error}"
        return _describe(record["problem"], record["first_bad_layer"], findings, samples, place)

    def _newest_checkpoint(self, step: int) -> Path | None:
        """The checkpoint to go back to from this step, the same on every rank."""
        newest: Path | None = None
        if self._topology.rank == 0:
            begun = self._resume_from
            state = load_state(begun) if begun is not None else {}
            if state.get("optimizer") is False:  # weights alone have no moments to go back to
                begun, state = None, {}
            # the folder may hold later ones too, if this run began from an older one
            steps = range(state.get("step", 0) + 1, step)
            saved = list_checkpoints(checkpoints_folder(self._config))
            found = [path for path in saved if step_of(path) in steps]
            newest = found[-1] if found else begun
        return broadcast(newest)

    def _samples(self, step: int, findings: Sequence[RankFinding]) -> list[dict[str, Any]]:
        """The samples of the micro-batches to blame, or of the whole step if none is known."""
        size = self._topology.data_size
        # the run's own reader is reading ahead
        reader = BatchReader(self._config, self._tokenizer, self._reader.state(), step - 1)
        places = {(f.data_rank, number) for f in findings for number in f.micro_batches}
        indices: list[int] = []
        for data_rank in range(size):
            micro_batches = reader.indices_for(step, data_rank, size)
            for number, samples in enumerate(micro_batches):
                if not places or (data_rank, number) in places:
                    indices += samples
        return [{"sample": i, "documents": _documents(reader, i)} for i in sorted(indices)]


def stop_error(
    step: int, words: str, action: str = "stop", found: Sequence[int] = (), limit: int = 0
) -> TrainingError:
    """Why a run stops, and what to do.

    Args:
        step: Counted from 1.
        words: What was found.
        action: stop, or why the policy's other way cannot be gone.
        found: Steps that were left out before.
        limit: How many may be.
    """
    look = "look at output_norm and max_logit in metrics.jsonl before this step"
    remedies = {
        "stop": f"Resume from the last checkpoint with a lower optimizer.lr, and {look}",
        "limit": f"Resume from a checkpoint before step {min(found, default=step)} with a lower "
        f"optimizer.lr, or raise training.nonfinite_limit, and {look}",
        "broken weights": "Resume from the last checkpoint: the same command goes on",
        "no checkpoint": f"Start again with training.skip_steps=[{step}], and save more often "
        "(checkpoint.every_steps)",
    }
    before = f"{len(found)} step{'s were' if len(found) != 1 else ' was'} left out before"
    numbers = f" ({', '.join(map(str, found))})" if found else ""
    reasons = {
        "limit": f"; {before}{numbers}, and training.nonfinite_limit is {limit}",
        "broken weights": "; leaving out the update cannot mend the weights",
        "no checkpoint": "; there is no checkpoint to go back to",
    }
    return TrainingError(f"step {step}", f"{words}{reasons.get(action, '')}", remedies[action])


def _find(
    step: int, engine: TrainingEngine, micro_batches: Sequence[Batch], topology: Topology
) -> list[RankFinding]:
    """What each rank finds, by rank. A collective."""
    losses = [
        number
        for number, loss in enumerate(engine.monitor.last_losses)
        if not torch.isfinite(loss).item()
    ]
    weights = [n for n, w in engine.named_parameters() if not torch.isfinite(w).all().item()]
    with _watch_gradients(engine) as gradients:
        engine.repeat_pass(step, micro_batches)
    own = RankFinding(
        topology.rank, topology.data_rank, socket.gethostname(), losses, weights, gradients
    )
    return all_gather(own)


@contextmanager
def _watch_gradients(engine: TrainingEngine) -> Iterator[dict[str, list[int]]]:
    """Gives the names of gradients that are not finite, with the numbers of their micro-batches.

    A parameter has a gradient a micro-batch, in their order; the hooks see it before it is added to
    those of others. Where the matrix product has added it to the buffer (fused accumulation), what
    they see is an empty dummy: then the buffer is looked at, and only the first micro-batch that
    broke it is known.
    """
    found: dict[str, list[int]] = {}
    seen: dict[str, int] = {}

    def look(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        number = seen.get(name, 0)
        seen[name] = number + 1
        in_buffer = getattr(parameter, "grad_added_to_main_grad", False)
        if in_buffer and name in found:
            return
        values = parameter.main_grad if in_buffer else gradient  # type: ignore[attr-defined]
        if not torch.isfinite(values).all().item():
            found.setdefault(name, []).append(number)

    handles = [
        parameter.register_hook(partial(look, name, parameter))
        for part in engine.parts
        for name, parameter in named_global_parameters(part)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_layer(norms: Sequence[float | None]) -> str | None:
    """The first layer whose output was not finite on some rank, by its name in the model."""
    numbers = (i for i, norm in enumerate(norms) if norm is not None and not math.isfinite(norm))
    first = next(numbers, None)
    return None if first is None else f"decoder.layers.{first}"


def _documents(reader: BatchReader, index: int) -> list[dict[str, Any]]:
    """The parts of documents of a sample, as ``chameleon data audit`` names them."""
    sample = reader.sample(index)
    parts = sample.packed.parts
    return [
        {
            "source": sample.source_names[source],
            "document": int(parts.document[i]),
            "tokens": [int(parts.start[i]), int(parts.stop[i])],
        }
        for i, source in enumerate(sample.packed.source.tolist())
    ]


def _describe(
    problem: str,
    layer: str | None,
    findings: Sequence[RankFinding],
    samples: Sequence[Mapping[str, Any]],
    place: str,
) -> str:
    """Everything in a line of bounded length; the file has the rest."""
    words = [f"{problem} (first in the output of {layer})" if layer else problem]
    bad = [f.rank for f in findings if f.losses]
    if bad:
        words.append(f"loss not finite on {_numbers('rank', bad)}")
    if any(f.weights for f in findings):
        words.append(f"weights not finite: {describe_names([f.weights for f in findings])}")
    if any(f.gradients for f in findings):
        names = describe_names([list(f.gradients) for f in findings])
        words.append(f"gradients not finite: {names}")
    elif not bad:
        words.append("not found again when the pass was repeated: suspect a machine")
    if samples:
        words.append(_numbers("sample", [sample["sample"] for sample in samples]))
    return f"{', '.join(words)} ({place})"


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:SHOWN_SAMPLES])
    more = len(numbers) - SHOWN_SAMPLES
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{f' and {more} more' * (more > 0)}"
