"""The training loop, from checked inputs to the last checkpoint.

Try it: ``torchrun --nproc-per-node 2 -m megatron_chameleon train examples/digits/train.yaml``
"""

import logging
from pathlib import Path

from megatron_chameleon.model.backend import check_machine
from megatron_chameleon.parallel.collectives import raise_together
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.meeting import StoppedWaiting
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.training.faults.nonfinite import Rollback
from megatron_chameleon.training.faults.signals import StopSignals
from megatron_chameleon.training.open_run import Run
from megatron_chameleon.training.prepare import refresh_inputs
from megatron_chameleon.training.records.events import EventLog
from megatron_chameleon.training.reference.measure import StoppedMeasuring
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.lock import lock_run
from megatron_chameleon.training.run.memory_check import memory_problem

logger = logging.getLogger(__name__)


def train(inputs: RunInputs, launch: Launch) -> bool:
    """Train to the last step of the config. Every process of the run calls it.

    Args:
        inputs: From ``prepare_run``.
        launch: From ``find_launch``.

    Returns:
        Whether the last step was done; False if a signal stopped the run before it.

    Raises:
        ConfigErrors: The machine lacks several things that the config needs.
        ConfigError: The run cannot fit into the memory of this machine.
        ConfigError: Another run is writing the run folder.
        CheckpointError: A checkpoint cannot be read or written.
        TrainingError: The run cannot go on, for example after a non-finite loss.
    """
    check_machine(inputs.config)
    vocab_size = inputs.tokenizer.vocabulary.size
    if problem := memory_problem(
        inputs.config, vocab_size, launch.world_size, inputs.with_gradient
    ):
        raise problem
    with StopSignals() as stop_signals:
        prepare_megatron()
        try:
            join_process_group(launch, stop_signals.received)
        except StoppedWaiting as stop:
            logger.info(
                f"{stop}: stopped before all ranks were here; the same command starts again"
            )
            return False
        try:
            run_dir, rank = Path(inputs.config.logging.run_dir), launch.rank
            with lock_run(run_dir), EventLog(inputs.config, rank) as events:
                inputs = refresh_inputs(inputs, launch.world_size)
                return train_joined(inputs, stop_signals, events)
        finally:
            leave_process_group()


def train_joined(inputs: RunInputs, stop_signals: StopSignals, events: EventLog) -> bool:
    """``train`` for a process that has joined its process group, which it does not leave."""
    try:
        with Run(inputs, stop_signals, events) as run:
            while True:
                try:
                    return train_steps(run)
                except Rollback as rollback:
                    run.roll_back_to(rollback.checkpoint, str(rollback))
    except StoppedMeasuring:
        return False


def train_steps(run: Run) -> bool:
    """Do the remaining steps. Return whether the last one was done.

    Raises:
        TrainingError: The run cannot go on, for example after a non-finite loss.
        Rollback: The run is to continue from an earlier checkpoint.
    """
    run.catch_up()
    for step, micro_batches in run.steps():
        run.reporter.begin_step(step)
        metrics = run.engine.train_step(step, micro_batches, update=not run.skips(step))
        metrics = run.reporter.complete(run.inputs.counted(metrics, step), run.engine.clock)
        # First, because a step that ends the run or is undone leaves no line in metrics.jsonl.
        run.guard.check(step, metrics, micro_batches, before_save=run.saver.is_due(step))
        if run.validator.is_due(step):
            metrics |= run.validate(step)
        run.reporter.end_step(step, metrics)

        run.saver.poll()
        stop = run.stop_signals.agreed(run.reporter.failure)
        is_saved = (stop or run.saver.is_due(step)) and run.save(step)
        if stop and step < run.config.training.steps:
            run.stop(stop, step, is_saved)
            return False
        if run.sampler.is_due(step):
            run.sample(step)
    raise_together(run.reporter.failure)
    run.finish()
    return True
