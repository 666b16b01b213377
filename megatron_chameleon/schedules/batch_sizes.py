"""The global batch size of each step: constant, or growing at the beginning of a run.

``training.rampup_batch_size: [start, increment, samples]`` is megatron-core's: the size grows from
``start`` to ``global_batch_size`` in equal increments, evenly over the first ``samples`` samples.
A step's size depends on nothing but the samples before it.

    >>> from megatron_chameleon.config.schema import TrainingConfig
    >>> ramp = TrainingConfig(global_batch_size=8, rampup_batch_size=[4, 2, 16])
    >>> [size_at(ramp, samples) for samples in (0, 4, 8, 14, 22)]
    [4, 4, 6, 6, 8]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chameleon.config.schema import TrainingConfig


@dataclass(frozen=True)
class BatchSize:
    """The global batch size from one step of a run on."""

    first_step: int
    """Number of steps before it."""
    first_sample: int
    global_batch_size: int


def sizes_of(training: TrainingConfig) -> Sequence[int]:
    """The sizes from the first to the last one, in ascending order.

    Args:
        training: Its ramp is valid (``config/checks/schedules.py``).
    """
    if not training.rampup_batch_size:
        return [training.global_batch_size]
    start, increment, _ = training.rampup_batch_size
    return range(start, training.global_batch_size + 1, increment)


def size_at(training: TrainingConfig, samples: int) -> int:
    """The size of a step before which a run has read some samples."""
    sizes = sizes_of(training)
    if len(sizes) == 1:
        return sizes[0]
    increments, ramp = len(sizes) - 1, training.rampup_batch_size[2]
    return sizes[min(increments, samples * increments // ramp)]


def plan_batches(
    training: TrainingConfig, steps_done: int = 0, samples: int = 0
) -> tuple[BatchSize, ...]:
    """The batch sizes of a run from a step on.

    Args:
        training: As in ``sizes_of``.
        steps_done: Number of steps before it.
        samples: Number of samples that they have read.
    """
    increments = len(sizes_of(training)) - 1
    batches = [BatchSize(steps_done, samples, size_at(training, samples))]
    while batches[-1].global_batch_size < training.global_batch_size:
        last, ramp = batches[-1], training.rampup_batch_size[2]
        number = last.first_sample * increments // ramp + 1  # of the next increment
        border = -(-number * ramp // increments)  # the first sample at which it has been reached
        steps = -(-(border - last.first_sample) // last.global_batch_size)
        sample = last.first_sample + steps * last.global_batch_size
        batches.append(BatchSize(last.first_step + steps, sample, size_at(training, sample)))
    return tuple(batches)


def continue_batches(
    batches: Sequence[BatchSize], training: TrainingConfig, steps_done: int
) -> tuple[BatchSize, ...]:
    """The batch sizes of a run that continues after some steps, which a config may change.

    Args:
        batches: As they were planned before.
        training: Of the config as it is now.
        steps_done: Number of steps done.
    """
    kept = [batch for batch in batches if batch.first_step < steps_done]
    planned = plan_batches(training, steps_done, samples_before(batches, steps_done))
    if kept and kept[-1].global_batch_size == planned[0].global_batch_size:
        planned = planned[1:]
    return (*kept, *planned)


def batch_of(batches: Sequence[BatchSize], steps_done: int) -> BatchSize:
    """The entry for the step after ``steps_done`` steps."""
    return next(batch for batch in reversed(batches) if batch.first_step <= steps_done)


def samples_before(batches: Sequence[BatchSize], steps_done: int) -> int:
    """Number of samples that the first ``steps_done`` steps have read."""
    batch = batch_of(batches, steps_done)
    return batch.first_sample + (steps_done - batch.first_step) * batch.global_batch_size


def steps_before(batches: Sequence[BatchSize], sample: int) -> int:
    """Number of steps whose first sample comes before a sample."""
    batch = next((b for b in reversed(batches) if b.first_sample < sample), None)
    if batch is None:
        return 0
    return batch.first_step - (batch.first_sample - sample) // batch.global_batch_size
