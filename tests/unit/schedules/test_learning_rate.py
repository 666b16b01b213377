"""The learning rate of each step, against the formulas and against megatron-core as it is."""

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_chameleon.config.schema import Config
from megatron_chameleon.schedules.learning_rate import LearningRate, StepScheduler

PEAK, LOWEST, STEPS = 3e-3, 1e-5, 137
SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: 2 * 0.5**x - 1,
}


def make(style: str, warmup: int = 0, shape: str = "linear", decay: int | None = None) -> Config:
    config = Config()
    config.training.steps = STEPS
    values = config.optimizer
    values.lr, values.min_lr, values.lr_warmup_steps = PEAK, LOWEST, warmup
    values.lr_decay_style, values.lr_wsd_decay_style = style, shape
    values.lr_wsd_decay_steps = decay
    return config


def by_hand(step: int, warmup: int, decay: int, shape: str | None) -> float:
    """The table of docs/schedules.md; ``shape`` None is a constant rate."""
    if step <= warmup:
        return PEAK * step / warmup
    done = step - 1 - (STEPS - decay)  # steps of the decay before this one
    share = SHAPES[shape](done / decay) if shape and done > 0 else 1.0
    return LOWEST + (PEAK - LOWEST) * share


@pytest.mark.parametrize("warmup", [0, 1, 2, 30, STEPS - 2])
@pytest.mark.parametrize(
    ("style", "shape", "decay"),
    [
        ("constant", None, 0),
        ("cosine", "cosine", None),
        ("exponential", "exponential", None),
        *(("wsd", shape, decay) for shape in SHAPES for decay in (2, 25, STEPS)),
    ],
)
def test_every_step_is_as_computed_by_hand(style, shape, decay, warmup) -> None:
    rest = STEPS - warmup
    config = make(style, warmup)
    if style == "wsd":
        decay = min(decay, rest)
        config = make(style, warmup, shape, decay)
    rate = LearningRate.of(config)
    found = [rate.at(step) for step in range(1, STEPS + 1)]
    count = rest if decay is None else decay
    hand = [by_hand(step, warmup, count, shape) for step in range(1, STEPS + 1)]
    assert found == pytest.approx(hand, rel=1e-14, abs=0)
    assert found[0] == (PEAK / warmup if warmup else pytest.approx(PEAK))
    assert min(found) >= LOWEST > 0 or warmup  # no step is wasted at the end either
    assert found[max(warmup - 1, 0)] == max(found)


@pytest.mark.parametrize("warmup", [0, 1, 40])
@pytest.mark.parametrize("style", ["exponential", "cosine", "constant"])
def test_runs_of_earlier_versions_keep_their_rates_to_the_last_bit(style, warmup) -> None:
    exponential = style == "exponential"
    group: dict[str, float] = {}
    before = OptimizerParamScheduler(  # as every version before this rule built it
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=PEAK,
        min_lr=LOWEST,
        lr_warmup_steps=warmup,
        lr_decay_steps=STEPS,
        lr_decay_style="WSD" if exponential else style,
        wsd_decay_steps=STEPS - warmup if exponential else None,
        lr_wsd_decay_style="exponential" if exponential else None,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    old = LearningRate.of(make(style, warmup), warmup_begin=0)
    new = LearningRate.of(make(style, warmup))
    for step in range(1, STEPS + 1):
        assert old.at(step) == group["lr"]
        if step > warmup:
            assert new.at(step) == group["lr"]
        elif step < warmup:
            assert new.at(step) == pytest.approx(old.at(step + 1), rel=1e-15)
        before.step(1)


def test_the_schedulers_step_and_the_function_agree_wherever_a_run_continues() -> None:
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"max_lr": 2 * PEAK, "min_lr": 2 * LOWEST}]
    for begin in (0, 1):
        rate = LearningRate.of(make("wsd", 20, "minus_sqrt", 30), warmup_begin=begin)
        for done in (0, 7, 20, 64, 120):
            scheduler = StepScheduler(SimpleNamespace(param_groups=groups), rate, 0.1)
            scheduler.continue_after(done)
            for step in range(done + 1, STEPS + 1):
                assert [group["lr"] for group in groups[:2]] == [rate.at(step)] * 2
                assert groups[2]["lr"] == pytest.approx(2 * rate.at(step), rel=1e-15)
                assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
                scheduler.step(1)


def test_a_longer_wsd_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    short, long = make("wsd", 20, "linear", 30), make("wsd", 20, "linear", 30)
    long.training.steps = 4 * STEPS
    stable = range(1, STEPS - 30 + 2)  # the first step of a decay still has the peak
    rates = [LearningRate.of(config) for config in (short, long)]
    assert [rates[0].at(step) for step in stable] == [rates[1].at(step) for step in stable]
    assert rates[0].at(stable[-1] + 1) < rates[1].at(stable[-1] + 1) == PEAK
