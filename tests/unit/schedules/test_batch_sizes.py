"""The batch size of each step, against megatron-core's calculator, and what a resume changes."""

import random

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.checks.schedules import check_ramp
from megatron_chameleon.config.schema import Config, SourceConfig, TrainingConfig
from megatron_chameleon.errors import ConfigErrors
from megatron_chameleon.schedules.batch_sizes import (
    BatchSize,
    batch_of,
    continue_batches,
    plan_batches,
    samples_before,
    size_at,
    steps_before,
)


def ramp(size: int, *values: int) -> TrainingConfig:
    return TrainingConfig(global_batch_size=size, rampup_batch_size=list(values))


def random_ramps() -> list[TrainingConfig]:
    draw = random.Random(0)
    found = []
    for _ in range(40):
        start, increment, count = draw.randint(1, 9), draw.randint(1, 7), draw.randint(1, 9)
        # Multiples of the count, because megatron-core divides in floating point.
        found.append(ramp(start + increment * count, start, increment, count * draw.randint(1, 90)))
    return found


@pytest.mark.parametrize("training", random_ramps())
def test_every_step_has_the_size_that_megatron_core_gives_it(training) -> None:
    start, increment, samples = training.rampup_batch_size
    size = training.global_batch_size
    reference = RampupBatchsizeNumMicroBatchesCalculator(
        size, 1, 1, False, 1, start, increment, samples
    )
    batches, consumed = plan_batches(training), 0
    for step in range(300):
        reference.update(consumed, consistency_check=True)
        expected = reference.get_current_global_batch_size()
        assert batch_of(batches, step).global_batch_size == expected
        assert size_at(training, consumed) == expected
        assert samples_before(batches, step) == consumed
        assert steps_before(batches, consumed) == step
        assert steps_before(batches, consumed + 1) == step + 1
        assert continue_batches(batches, training, step) == batches
        consumed += expected
    assert expected == size


def test_a_ramp_that_is_not_a_multiple_grows_at_the_first_whole_sample() -> None:
    # 10 samples in 3 parts: at 3 1/3, 6 2/3 and 10
    training = ramp(4, 1, 1, 10)
    sizes = [size_at(training, samples) for samples in range(12)]
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]


def test_sizes_that_one_step_jumps_over_have_no_entry() -> None:
    assert plan_batches(ramp(100, 10, 10, 18)) == (
        BatchSize(0, 0, 10),
        BatchSize(1, 10, 60),
        BatchSize(2, 70, 100),
    )


def test_a_resume_may_change_the_ramp() -> None:
    old = plan_batches(ramp(8, 4, 2, 16))
    assert old == (BatchSize(0, 0, 4), BatchSize(2, 8, 6), BatchSize(4, 20, 8))
    constant = TrainingConfig(global_batch_size=6)
    assert continue_batches(old, constant, 3) == old[:2]
    assert continue_batches(old, constant, 5) == (*old, BatchSize(5, 28, 6))
    # What counts is how many samples the run has read, not where it was resumed.
    longer = ramp(8, 4, 2, 32)
    assert continue_batches(old, longer, 2) == (
        BatchSize(0, 0, 4),
        BatchSize(4, 16, 6),
        BatchSize(7, 34, 8),
    )
    before = plan_batches(TrainingConfig(global_batch_size=4))
    late = continue_batches(before, ramp(8, 4, 2, 16), 3)
    assert late == (BatchSize(0, 0, 4), BatchSize(3, 12, 6), BatchSize(4, 18, 8))
    assert continue_batches(before, ramp(8, 4, 2, 16), 9) == (before[0], BatchSize(9, 36, 8))


def check(training: TrainingConfig, world_size: int = 1, **parallel: int) -> list[str]:
    config = Config(training=training)
    training.steps = 50
    config.tokenizer.path, config.data.stage1 = "t", [SourceConfig("p")]
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    with pytest.raises(ConfigErrors) as caught:
        check_config(config, world_size)
    return caught.value.lines()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([4], "[4] is not [start, increment, samples]. Write three numbers"),
        ([4, 4, 8, 8], "[4, 4, 8, 8] is not [start, increment, samples]. Write three numbers"),
        ([16, 4, 8], "its start 16 is not below global_batch_size 16. Use a smaller start"),
        ([99, 4, 8], "its start 99 is not below global_batch_size 16. Use a smaller start"),
        (
            [4, 5, 8],
            "increments of 5 lead from 4 to 14, not to global_batch_size 16. Use an increment "
            "that divides 12.",
        ),
        ([4, 100, 8], "increments of 100 lead from 4 to 4, not to global_batch_size 16."),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(values, told) -> None:
    (line,) = check(ramp(16, *values))
    assert line.startswith(f"training.rampup_batch_size: {told}")


def test_a_ramp_of_too_many_sizes_is_refused() -> None:
    config = Config(training=ramp(5001, 1, 2, 10**6))
    (problem,) = check_ramp(config)
    assert str(problem).endswith(
        "2,500 increments of 2 are more than 1,000. Use an increment of at least 5."
    )
    config.training.rampup_batch_size[1] = 5
    assert [*check_ramp(config)] == []


def test_all_sizes_that_cannot_be_dealt_out_are_named() -> None:
    training = ramp(16, 4, 2, 100)
    training.micro_batch_size = 2
    lines = check(training, world_size=2)
    assert lines == [
        "training.rampup_batch_size: 3 of its sizes are not divisible by micro_batch_size 2 x data "
        "parallel 2 = 4: 6, 10, 14. Use a start and an increment that are multiples of 4, or [] if "
        "the run is past its warm-up, or use the nearest layout that works: tensor 1 x pipeline 2; "
        "tensor 2 x pipeline 1."
    ]
    training.rampup_batch_size = [10, 3, 100]
    (line,) = check(training, world_size=4, pipeline_model_parallel_size=2)
    assert "2 of its sizes are not divisible by micro_batch_size 2 x data parallel 2 = 4: " in line


def test_interleaved_stages_need_more() -> None:
    interleaved = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    (line,) = check(ramp(16, 3, 1, 100), 2, **interleaved)
    assert line.startswith(
        "training.rampup_batch_size: 7 of its sizes are not divisible by micro_batch_size 1 x data "
        "parallel 1 = 1, times 2 interleaved pipeline stages: 3, 5, 7, 9, 11, 13, 15. Use a start "
        "and an increment that are multiples of 2"
    )
