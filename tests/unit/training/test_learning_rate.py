"""A decay that tokens or a stage place: where a run's history puts it, and what is refused."""

import json

import pytest

from megatron_chameleon.config.checks.schedules import check_schedules
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.mixture.mixture_history import (
    BatchSize,
    MixtureEntry,
    MixtureHistory,
    stage2_begin,
)
from megatron_chameleon.data.mixture.phases import MixtureWeights, SourceWeight
from megatron_chameleon.data.mixture.sources import SourceSnapshot
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.training.learning_rate import run_learning_rate

LENGTH, BATCH, STEPS = 32, 4, 100
ONE_SIZE = (BatchSize(0, 0, BATCH),)


def make(**optimizer) -> Config:
    config = Config()
    config.model.seq_length, config.training.steps = LENGTH, STEPS
    config.training.global_batch_size = BATCH
    config.data.stage2 = [SourceConfig("two")]
    config.optimizer.lr, config.optimizer.lr_warmup_steps = 1.0, 10
    config.optimizer.lr_decay_style = "wsd"
    for name, value in optimizer.items():
        setattr(config.optimizer, name, value)
    return config


def entry(first_sample: int, stage1_samples: int, *, stage2: bool = True) -> MixtureEntry:
    one, two = SourceWeight("one", 1.0, None), SourceWeight("two", 1.0, None)
    weights = MixtureWeights((one,), (two,) if stage2 else (), 0.5, stage1_samples, 0.0)
    snapshot = SourceSnapshot("prefix", 0, 10, 1, None)
    return MixtureEntry(first_sample, weights, {"one": snapshot, "two": snapshot}, 64)


def history(*entries: MixtureEntry, batches=ONE_SIZE) -> MixtureHistory:
    return MixtureHistory(1, LENGTH, False, entries, batches, lr_warmup_begin=1)


def begin_of(config: Config, *args, **values) -> int:
    """Number of steps before the decay."""
    rate = run_learning_rate(config, history(*args, **values))
    return config.training.steps - rate.decay_steps


def test_the_decay_of_stage_2_begins_with_its_first_step() -> None:
    config = make(lr_wsd_decay_on="stage2")
    assert begin_of(config, entry(0, 80 * BATCH)) == 80
    rate = run_learning_rate(config, history(entry(0, 80 * BATCH)))
    assert [rate.at(step) for step in (80, 81, 82, 100)] == pytest.approx([1, 1, 0.95, 0.05])
    # A border within a step: the step's first sample says what the step is.
    assert begin_of(config, entry(0, 80 * BATCH + 1)) == 81
    # The run was extended: stage 2 stays where it began, whatever the config says now.
    config.training.steps = 200
    assert begin_of(config, entry(0, 80 * BATCH)) == 80


def test_an_edit_within_stage_2_does_not_move_the_decay() -> None:
    config = make(lr_wsd_decay_on="stage2")
    edited = (entry(0, 60 * BATCH), entry(70 * BATCH, 65 * BATCH), entry(90 * BATCH, 0))
    assert begin_of(config, *edited) == 60
    assert begin_of(config, entry(0, 60 * BATCH), entry(70 * BATCH, 85 * BATCH)) == 85
    without = entry(70 * BATCH, 0, stage2=False)
    assert begin_of(config, entry(0, 60 * BATCH), without, entry(75 * BATCH, 0)) == 75
    assert stage2_begin(history(entry(0, 60 * BATCH), without), STEPS) is None


def test_tokens_are_counted_from_the_end_over_all_batch_sizes() -> None:
    config = make(lr_wsd_decay_tokens=20 * BATCH * LENGTH)
    assert begin_of(config, entry(0, 0)) == 80
    config.optimizer.lr_wsd_decay_tokens = 20 * BATCH * LENGTH - 1
    assert begin_of(config, entry(0, 0)) == 80
    # From step 90 on the batches are three times as large, so the last 10 steps have 3/2 of them.
    batches = (BatchSize(0, 0, BATCH), BatchSize(90, 90 * BATCH, 3 * BATCH))
    assert begin_of(config, entry(0, 0), batches=batches) == 94
    config.optimizer.lr_wsd_decay_tokens = 40 * BATCH * LENGTH
    assert begin_of(config, entry(0, 0), batches=batches) == 80


def test_a_history_of_an_earlier_version_keeps_the_old_first_step() -> None:
    config = make(lr_wsd_decay_steps=20)
    record = json.loads(json.dumps(history(entry(0, 0)).to_json()))
    assert run_learning_rate(config, MixtureHistory.from_json(record)).at(1) == 0.1
    del record["lr_warmup_begin"]
    old = MixtureHistory.from_json(record)
    assert [run_learning_rate(config, old).at(step) for step in (1, 2, 11)] == [0.0, 0.1, 1.0]
    assert old.to_json()["lr_warmup_begin"] == 0, "a resumed run would change its rule"
    for value in (2, -1, True, "1", None):
        with pytest.raises(ValueError, match="lr_warmup_begin is"):
            MixtureHistory.from_json({**record, "lr_warmup_begin": value})


@pytest.mark.parametrize(
    ("settings", "samples", "told"),
    [
        (
            {"lr_wsd_decay_on": "stage2"},
            STEPS * BATCH,
            "optimizer.lr_wsd_decay_on: stage 2 has 0 of the 100 steps, and a decay needs at least "
            "2. Lower data.stage1_fraction, or place the decay by optimizer.lr_wsd_decay_steps.",
        ),
        (
            {"lr_wsd_decay_on": "stage2"},
            99 * BATCH,
            "optimizer.lr_wsd_decay_on: stage 2 has 1 of the 100 steps, and a decay needs at least "
            "2. Lower data.stage1_fraction, or place the decay by optimizer.lr_wsd_decay_steps.",
        ),
        (
            {"lr_wsd_decay_on": "stage2"},
            0,
            "optimizer.lr_wsd_decay_on: stage 2 begins after step 0, within the warm-up of 10 "
            "steps. Let it begin later, or set optimizer.lr_warmup_steps to at most 0.",
        ),
        (
            {"lr_wsd_decay_tokens": 10**18},
            0,
            "optimizer.lr_wsd_decay_tokens: 1,000,000,000,000,000,000 is more than the 11,520 "
            "tokens that the run reads after its warm-up. Use at most 11520.",
        ),
        (
            {"lr_wsd_decay_tokens": BATCH * LENGTH},
            0,
            "optimizer.lr_wsd_decay_tokens: 128 is less than the 256 tokens of two steps, "
            "which a decay needs. Use at least 256.",
        ),
    ],
)
def test_a_decay_that_does_not_fit_the_history_is_refused(settings, samples, told) -> None:
    with pytest.raises(ConfigError) as caught:
        run_learning_rate(make(**settings), history(entry(0, samples)))
    assert str(caught.value) == told


def test_the_limits_that_the_errors_name_are_accepted() -> None:
    assert begin_of(make(lr_wsd_decay_tokens=11520), entry(0, 0)) == 10
    assert begin_of(make(lr_wsd_decay_tokens=256), entry(0, 0)) == 98


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            "optimizer.lr_decay_style: wsd does not say where the decay begins. Set "
            "optimizer.lr_wsd_decay_steps, such as 20 for the last fifth of the run, "
            "optimizer.lr_wsd_decay_tokens or optimizer.lr_wsd_decay_on.",
        ),
        (
            {"lr_wsd_decay_steps": 20, "lr_wsd_decay_on": "stage2"},
            "optimizer.lr_wsd_decay_steps: optimizer.lr_wsd_decay_on is set too, and each of them "
            "says where the decay of wsd begins. Keep one of them, and set the others to null.",
        ),
        (
            {"lr_wsd_decay_steps": 91},
            "optimizer.lr_wsd_decay_steps: 91 steps of decay and 10 of warm-up do not fit into "
            "training.steps 100. Use at most 90.",
        ),
        (
            {"lr_wsd_decay_steps": 5, "lr_warmup_steps": 99},
            "optimizer.lr_wsd_decay_steps: 5 steps of decay and 99 of warm-up do not fit into "
            "training.steps 100. Use more steps or a shorter warm-up.",
        ),
        (
            {"lr_decay_style": "cosine", "lr_wsd_decay_steps": 20},
            "optimizer.lr_wsd_decay_steps: 20 has no effect with lr_decay_style cosine. Set "
            "optimizer.lr_decay_style to wsd, or this to null.",
        ),
        (
            {"lr_decay_style": "exponential", "lr_wsd_decay_style": "cosine"},
            "optimizer.lr_wsd_decay_style: cosine has no effect with lr_decay_style exponential. "
            "Set optimizer.lr_decay_style to wsd, or this to linear.",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, told) -> None:
    (problem,) = check_schedules(make(**settings))
    assert str(problem) == told


def test_a_decay_on_a_stage_that_is_not_there() -> None:
    config = make(lr_wsd_decay_on="stage2")
    config.data.stage2 = []
    (problem,) = check_schedules(config)
    assert str(problem) == (
        "optimizer.lr_wsd_decay_on: stage2 needs data.stage2, which has no sources. List its "
        "sources, or place the decay by optimizer.lr_wsd_decay_steps."
    )
