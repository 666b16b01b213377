"""Report each step of a run: to files, console and trackers, with an alarm and a trace.

Only rank 0 writes. The other ranks have a reporter too, which only records traces.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from megatron_chameleon.checkpoint.state.folders import step_of
from megatron_chameleon.checkpoint.state.line import METRICS_FILE, list_line
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.gpus import find_gpu
from megatron_chameleon.planner.time import uses_fp8
from megatron_chameleon.training.metrics.divergence import Alarm, DivergenceAlarm
from megatron_chameleon.training.metrics.overfitting import HeldOutTurn, OverfittingAlarm
from megatron_chameleon.training.metrics.profiler import StepProfiler
from megatron_chameleon.training.metrics.stragglers import StepClock, StragglerMonitor
from megatron_chameleon.training.records.events import EventLog
from megatron_chameleon.training.run.console import (
    HELD_OUT_LOSS,
    Progress,
    held_out_line,
    open_console,
)
from megatron_chameleon.training.run.folder import RunFolder, checkpoints_folder
from megatron_chameleon.training.run.trackers import flat_numbers, open_trackers


class Reporter:
    """Takes the metrics of each step to wherever the config wants them.

    Args:
        config: A checked config.
        vocab_size: Number of tokens in the vocabulary.
        topology: The place of this process.
        steps_done: Steps that earlier processes of the run have done.
        events: Takes alarms and other events.
        samples_before: See ``Progress``.

    Attributes:
        failure: Why this rank cannot write a file. The loop lets all ranks end with it; an error
            that only one rank raises would leave the others waiting.

    Raises:
        ChameleonError: The file system refuses a file, or one is damaged.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        topology: Topology,
        steps_done: int,
        events: EventLog,
        samples_before: Callable[[int], int] | None = None,
    ) -> None:
        self.failure: ChameleonError | None = None
        self.config = config
        self._events = events
        self._speed = SpeedMeter(config, vocab_size, topology.world_size)
        self._profiler = StepProfiler(config, topology.rank)
        steps, window = config.training.steps, config.logging.every_steps
        self._stragglers = StragglerMonitor(topology, window, steps)
        self._is_writer = topology.rank == 0
        if not self._is_writer:
            return
        self._run = RunFolder(config, steps_done)
        self._alarm = DivergenceAlarm()
        past = (self._alarm.observe(*record) for record in self._run.history)
        self._run.write_alarms([asdict(alarm) for alarm in past if alarm is not None])
        self._overfitting = OverfittingAlarm()
        if config.data.validation.sources:
            for record in self._run.past_metrics():
                self._overfitting.observe(record)
        self._progress = Progress(steps_done, config.training.steps, samples_before)
        self._trackers = open_trackers(config, steps_done, self._run.past_metrics())
        self._console = open_console(steps_done, config.training.steps)
        if missing := self._run.missing_steps(steps_done):
            self._console.warn(f"{METRICS_FILE} has no lines for steps {missing}")

    def say(self, text: str) -> None:
        """Show a line, on rank 0."""
        if self._is_writer:
            self._console.say(text)

    def warn(self, text: str) -> None:
        """Show a warning, on rank 0."""
        if self._is_writer:
            self._console.warn(text)

    def begin_step(self, step: int) -> None:
        """Note that a step, counted from 1, is about to begin."""
        self._profiler.begin(step)

    def complete(self, metrics: Mapping[str, Any], clock: StepClock) -> dict[str, Any]:
        """Add to a step's metrics what follows from the time it took the run and each rank.

        After every ``logging.every_steps`` steps this is a collective.

        Args:
            metrics: Those of the engine, with ``step`` and ``step_seconds``.
            clock: The engine's.
        """
        ranks, warning = self._stragglers.observe(metrics["step"], clock)
        if warning:
            self.warn(warning)
            self._events.record("straggler", warning, metrics["step"])
        size = metrics.get("global_batch_size")
        return {**metrics, **self._speed.metrics(metrics["step_seconds"], size), **ranks}

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a step that was just done, with the metrics of ``complete``."""
        try:
            self._end_step(step, metrics)
        except ChameleonError as error:
            self.failure = error

    def flush_to_disk(self) -> None:
        """Make sure that the metrics survive a crash of the machine, as checkpoints do."""
        try:
            if self._is_writer:
                self._run.flush_to_disk()
        except ChameleonError as error:
            self.failure = error

    def _end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        trace = self._profiler.end(step)
        if not self._is_writer:
            return
        if trace is not None:
            self._console.say(f"traced {trace}")
        metrics = self._run.write_metrics(metrics)
        self._events.step = step
        for tracker in self._trackers:
            tracker.record(step, dict(flat_numbers(metrics)))
        is_shown = step % self.config.logging.every_steps == 0 or step == self.config.training.steps
        line = self._progress.line(step, metrics) if is_shown else None
        self._console.step(step, self._progress.short(step, metrics), line)
        if HELD_OUT_LOSS in metrics:
            self._console.say(held_out_line(step, metrics))
        if turn := self._overfitting.observe(metrics):
            text = turn_text(turn, self.config)
            self._console.warn(text)
            self._events.record("validation_rises", text, step, lowest_step=turn.lowest_step)
        alarm = self._alarm.observe(step, metrics["output_norm"], metrics["loss"])
        if alarm is not None:
            self._run.write_alarms([asdict(alarm)])
            text = alarm_text(alarm, self.config)
            self._console.warn(text)
            self._events.record("alarm", text, step)

    def close(self) -> None:
        """Finish the files. It is called after an error too, so that no record is lost."""
        if not self._is_writer:
            return
        self._console.close()
        self._run.close()
        for tracker in self._trackers:
            tracker.close()


class SpeedMeter:
    """Computes how fast the tokens of a step were processed.

    ``tflops`` and ``mfu`` are per GPU, counted as in ``planner/flops.py``. Both are None on CPUs,
    and ``mfu`` is None on GPUs whose peak is not in the planner's table.

    Args:
        config: A checked config.
        vocab_size: Number of tokens in the vocabulary.
        world_size: Number of processes of the run.
    """

    def __init__(self, config: Config, vocab_size: int, world_size: int) -> None:
        self._batch_size = config.training.global_batch_size
        self._seq_length = config.model.seq_length
        self._device_name = platform.device_name()
        gpu = find_gpu(self._device_name) if self._device_name else None
        dtype = config.training.dtype
        self._peak = gpu.peak_flops(dtype, uses_fp8(config)) if gpu else None
        frozen = config.adapter.rank > 0
        self._flops_per_token = training_flops_per_token(config.model, vocab_size, frozen)
        self._world_size = world_size

    def metrics(
        self, seconds: float | None, batch_size: int | None = None
    ) -> dict[str, float | None]:
        """The entries of ``metrics.jsonl`` for a step that took this long.

        Args:
            seconds: Of the step.
            batch_size: Its global batch size; None: that of the config.
        """
        tokens = (batch_size or self._batch_size) * self._seq_length
        rate = self._flops_per_token * tokens / self._world_size / (seconds or math.inf)
        return {
            "tokens_per_second": tokens / (seconds or math.inf),
            "mfu": rate / self._peak if self._peak else None,
            "tflops": rate / 1e12 if self._device_name else None,
        }


def turn_text(turn: HeldOutTurn, config: Config) -> str:
    """The line about a held-out loss that has turned, with the checkpoint to go back to."""
    checkpoints = list_line(checkpoints_folder(config))
    place = "no checkpoint of the run exists yet"
    if checkpoints:
        nearest = min(checkpoints, key=lambda path: abs(step_of(path) - turn.lowest_step))
        place = f"the checkpoint nearest to step {turn.lowest_step} is {nearest}"
    return (
        f"{turn}: from here on the model may be learning the training documents by heart; {place} "
        "(docs/validation.md)"
    )


def alarm_text(alarm: Alarm, config: Config) -> str:
    """The alarm in a line, with the remedies of the paper that the config does not use."""
    model = config.model
    missing = {
        "model.qk_norm_groups is 0 (no QK-norm)": model.qk_norm_groups == 0,
        "model.hidden_dropout is 0": model.hidden_dropout == 0 and model.norm_order == "pre",
        "training.z_loss is 0": config.training.z_loss == 0,
    }
    reasons = [words for words, is_missing in missing.items() if is_missing]
    because = f"; {' and '.join(reasons)}" if reasons else ""
    return (
        f"{alarm}: such growth precedes a divergence{because}. Look at layer_output_norms and "
        "max_attention_logit in metrics.jsonl, and lower optimizer.lr or go back to an earlier "
        "checkpoint (docs/stability.md)"
    )
