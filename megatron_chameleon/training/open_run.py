"""A run that is open: model built, data being read, and files being written."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from types import TracebackType

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.loading.beginning import describe_beginning
from megatron_chameleon.checkpoint.state.folders import load_state, step_of
from megatron_chameleon.checkpoint.state.resume import load
from megatron_chameleon.checkpoint.state.save import VALIDATION_LOSS, Saver
from megatron_chameleon.data.batches.reader import Batch, read_ahead
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.model.fusions import fusion_names
from megatron_chameleon.parallel.collectives import raise_together, run_on_rank_0
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.engines.base import build_engine
from megatron_chameleon.training.faults.hang import HangWatch
from megatron_chameleon.training.faults.nonfinite import NonFiniteGuard
from megatron_chameleon.training.faults.signals import StopSignals
from megatron_chameleon.training.faults.weights import check_loaded_weights
from megatron_chameleon.training.learning_rate import run_learning_rate
from megatron_chameleon.training.modalities.at_end import ModalityChecker, has_conversations
from megatron_chameleon.training.prepare import describe_run
from megatron_chameleon.training.records.events import EventLog
from megatron_chameleon.training.reference.measure import (
    REFERENCE,
    StoppedMeasuring,
    find_reference,
)
from megatron_chameleon.training.resume_changes import resume_lines
from megatron_chameleon.training.run.folder import checkpoints_folder
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.reporter import Reporter
from megatron_chameleon.training.samples.sampler import Sampler
from megatron_chameleon.training.samples.trained_model import TrainedModel, can_answer
from megatron_chameleon.training.validation.losses import LOSS
from megatron_chameleon.training.validation.validator import Validator

logger = logging.getLogger(__name__)


class Run:
    """Everything that the training loop works with, on one rank.

    Entering it builds the model, loads the checkpoint and opens data and files. Leaving it waits
    for the last checkpoint and closes them. Every rank does both, and calls every method.

    Args:
        inputs: From ``prepare_run``.
        stop_signals: The caller has already entered its ``with`` block.
        events: Likewise.

    Attributes:
        inputs: As given; after a rollback, as they were at that checkpoint.
        config: The run's config.
        stop_signals: As given.
        topology: This rank's position in the layout.
        events: As given: takes what happens to the run besides its steps.
        engine: Model, gradients, optimizer and schedule.
        watch: Ends the run if it hangs.
        sampler: Writes text and images during training.
        validator: Measures the held-out loss.
        reporter: Takes the metrics of each step, and lines for the user.
        saver: Writes checkpoints.
        guard: Acts on values that are not finite.
    """

    def __init__(self, inputs: RunInputs, stop_signals: StopSignals, events: EventLog) -> None:
        self.inputs, self.config = inputs, inputs.config
        self.stop_signals, self.events = stop_signals, events

    def __enter__(self) -> "Run":
        config, vocabulary = self.config, self.inputs.tokenizer.vocabulary
        start = self.inputs.checkpoint
        self.topology = create_topology(config.parallel)
        with ExitStack() as stack:
            self.watch = stack.enter_context(
                HangWatch(
                    limit_seconds=config.training.hang_seconds,
                    folder=Path(config.logging.run_dir) / "logs",
                    rank=self.topology.rank,
                    world_size=self.topology.world_size,
                    record=self.events.report_hang,
                )
            )
            self.watch.begin("building the model", 0, is_long=True)
            weights = self.inputs.start.weights
            with announced(f"building the model{f' from {weights}' if weights else ''}"):
                rate = run_learning_rate(config, self.inputs.reader.history)
                self.engine = build_engine(
                    *(config, vocabulary.size, self.topology, rate),
                    vocabulary.code_token_ids.tolist(),
                    weights=self.inputs.weights,
                )
            self.watch.clock = self.engine.clock
            checks = config.data.validation.modality_prompts and has_conversations(
                self.inputs.held_out
            )
            is_asked = (checks or config.logging.sample_every_steps) and can_answer(config)
            trained = TrainedModel(config, self.topology) if is_asked else None
            self.sampler = Sampler(config, trained)
            self._modalities = ModalityChecker(config, self.inputs.held_out, trained)
            # What a rollback closes and opens again has a stack of its own.
            self._restarted = stack.enter_context(ExitStack())
            steps_done = self._load(start) if start else 0
            if weights is not None:
                check_loaded_weights(self.engine.named_parameters(), weights)
            self._reference = self._find_reference(steps_done)
            self.events.start(steps_done)
            self._open_after(steps_done)
            self._report_start(start)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)
        if error is None:  # otherwise it might hide the error by one of its own
            self.engine.close()

    def _find_reference(self, steps_done: int) -> dict[str, str]:
        """Give the readers the reference of ``training.objective: dpo``.

        Returns:
            What checkpoints keep about it.
        """
        if self.config.training.objective != "dpo":
            return {}

        def stop(failure: ChameleonError | None) -> str | None:
            self.watch.begin("computing the reference log-probabilities", steps_done, is_long=True)
            return self.stop_signals.agreed(failure)

        with announced("computing the reference log-probabilities"):
            try:
                digest = find_reference(self.inputs, self.engine, self.topology, stop)
            except StoppedMeasuring as stopped:
                if self.topology.rank == 0:
                    logger.info(str(stopped))
                self.events.record("stop", str(stopped), steps_done)
                raise
        return {REFERENCE: digest}

    def _report_start(self, start: Path | None) -> None:
        """Say from where the run goes on, and with which other settings."""
        if start is not None:
            self.events.record("resume", f"goes on from {start}")
        if note := self.inputs.start.note:
            self.reporter.say(note)
            self.events.record("resume", note)
        if self.inputs.start.weights and (weights := self.inputs.weights):
            note = describe_beginning(weights, self.config)
            self.reporter.say(note)
            self.events.record("resume", note)
        for line in (lines := resume_lines(self.inputs)):
            self.reporter.say(line)
        if changes := lines[1:]:
            self.events.record("resume_change", "; ".join(map(str.strip, changes)))
        if note := self.inputs.trained.note:
            self.reporter.say(note)

    def _open_after(self, steps_done: int) -> None:
        """Open reporter, data and saver for the steps after ``steps_done``."""
        config, inputs, topology = self.config, self.inputs, self.topology
        self._steps_done = steps_done
        vocab_size = inputs.tokenizer.vocabulary.size
        failure = None
        try:
            samples_before = inputs.reader.history.first_sample
            reporter = Reporter(
                config, vocab_size, topology, steps_done, self.events, samples_before
            )
            self.reporter = self._restarted.enter_context(closing(reporter))
        except ChameleonError as error:
            failure = error
        raise_together(failure)
        self.reporter.say(f"{topology}; {describe_run(inputs)}; starts at step {steps_done}")
        if note := self.engine.average.note:
            self.reporter.say(note)
        if fused := fusion_names(config):
            self.reporter.say(f"fused kernels: {', '.join(fused)}")
        self._batches = self._restarted.enter_context(
            read_ahead(inputs.reader, steps_done, topology.data_rank, topology.data_size)
        )
        self.saver = self._restarted.enter_context(
            Saver(checkpoints_folder(config), self.engine, self._note_saved)
        )
        self.validator = Validator(
            inputs.held_out,
            self.engine,
            topology,
            self.watch,
            self.stop_signals,
            self.reporter.warn,
        )
        self._held_out_loss: tuple[int, float | None] = (0, None)
        self.guard = NonFiniteGuard(
            inputs,
            self.engine,
            topology,
            finish_saves=self.saver.wait,
            say=self.reporter.say,
            warn=self.reporter.warn,
            record=self.events.record,
        )

    def _load(self, checkpoint: Path) -> int:
        """Fill the engine from a checkpoint. Return the number of steps done up to it."""
        self.watch.begin("loading", load_state(checkpoint)["step"], is_long=True)
        with announced(f"loading {checkpoint}"):
            steps_done = load(checkpoint, self.engine)
        average = self.engine.average
        check_loaded_weights(
            chain(self.engine.named_parameters(), average.named_tensors()), checkpoint
        )
        return steps_done

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Each step that is still to do, counted from 1, with this rank's micro-batches."""
        return self.watch.steps(self._batches, self._steps_done)

    def skips(self, step: int) -> bool:
        """Whether the step's update is left out: the config says so, or it was not finite."""
        return step in self.inputs.skipped_steps

    def save(self, step: int) -> bool:
        """Start saving a checkpoint, once at least one step has made an update.

        Before the first update AdamW has no moments to save.

        Returns:
            Whether there was anything to save.

        Raises:
            TrainingError: Weights are not finite.
        """
        if not self.inputs.skipped_steps.count_updates(step):
            return False
        self.watch.begin("saving", step, is_long=True)
        if not self.saver.is_due(step):  # a signal asks for it, so the guard has not looked
            self.guard.check_weights(step)
        self.reporter.flush_to_disk()
        entries = self.inputs.checkpoint_entries(step) | self.engine.average.state_entries()
        entries |= self._reference
        measured_step, loss = self._held_out_loss
        if measured_step == step and loss is not None and math.isfinite(loss):
            entries[VALIDATION_LOSS] = loss
        self.saver.save(step, entries)
        return True

    def validate(self, step: int) -> dict[str, float | None]:
        """Measure the held-out loss after a step. Return its metrics."""
        metrics = self.validator.measure(step)
        self._held_out_loss = (step, metrics.get(LOSS))
        return metrics

    def _note_saved(self, checkpoint: Path) -> None:
        self.reporter.say(f"saved {checkpoint}")
        self.events.record("save", f"saved {checkpoint}", step_of(checkpoint))

    def stop(self, signal: str, step: int, is_saved: bool) -> None:
        """Finish the last checkpoint, and say why the run stops and what comes next.

        Args:
            signal: The name of the signal that asked for it.
            step: The last one that was done.
            is_saved: Whether there is a checkpoint of it.
        """
        self.saver.wait()
        text = f"{signal}: stopped after step {step}; {self.after_restart(is_saved)}"
        self.reporter.say(text)
        self.events.record("stop", text, step, signal=signal)

    def finish(self) -> None:
        """Finish the last checkpoint after the last step, and see what the model answers."""
        self.saver.wait()
        steps, checks = self.config.training.steps, self._modalities
        is_new = checks.is_due and self._steps_done < steps
        if is_new or run_on_rank_0(lambda: checks.is_missing(steps)):
            self._check_modalities(steps)
        self.events.record("finish", f"all {steps:,} steps are done", steps)

    def _check_modalities(self, step: int) -> None:
        """Tell whether the model answers in the modality that it is asked for. A collective."""
        reporter = self.reporter
        if self._modalities.obstacle:
            reporter.say(self._modalities.obstacle)
            return
        self.watch.begin("checking modalities", step, is_long=True)
        self.engine.complete_weights()
        failure, found = None, None
        try:
            found = self._modalities.check(step, self.engine.parts[0], reporter.say)
        except ChameleonError as error:
            failure = error
        raise_together(failure)  # and the other ranks wait until rank 0 has its answers
        if isinstance(found, str):
            if found:
                reporter.warn(found)
            return
        assert found is not None
        for text, weight in found.lines():
            (reporter.warn if weight else reporter.say)(text)
            if weight:
                self.events.record("modalities", text, step)

    def after_restart(self, is_saved: bool) -> str:
        """What the same command does after this process has stopped, in words."""
        if is_saved:
            return "the same command resumes the run"
        return (
            "nothing was saved, because no step has made an update yet; the same command starts "
            f"again from {self.inputs.beginning}"
        )

    def catch_up(self) -> None:
        """Write the samples of the step that the run starts behind, if a kill has prevented that.

        A collective of the job.
        """
        step = self._steps_done
        if step and run_on_rank_0(lambda: self.sampler.is_missing(step)):
            self.sample(step)

    def sample(self, step: int) -> None:
        """Let the model write its samples."""
        self.watch.begin("sampling", step, is_long=True)
        self.engine.complete_weights()
        try:
            line = self.sampler.sample(step, self.engine.parts[0])
        except ChameleonError as error:
            self.reporter.failure = error
            return
        if line:
            self.reporter.say(line)

    def roll_back_to(self, checkpoint: Path, reason: str) -> None:
        """Continue from an earlier checkpoint, as if the steps after it had not been done."""
        self.reporter.warn(reason)
        self.events.record("rollback", reason)
        self._restarted.close()
        steps_done = self._load(checkpoint)
        self.inputs = self.inputs.rewound_to(checkpoint)
        self._open_after(steps_done)
