"""What a resumed run says about its changes; the numbers are computed by hand here."""

import json
import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_chameleon.checkpoint.state.folders import STATE_FORMAT
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.mixture.mixture_history import MixtureEntry, MixtureHistory
from megatron_chameleon.data.mixture.phases import MixtureWeights, SourceWeight
from megatron_chameleon.data.mixture.sources import SourceSnapshot
from megatron_chameleon.schedules.batch_sizes import BatchSize
from megatron_chameleon.training.resume_changes import resume_lines

LENGTH, BATCH, STEPS = 32, 4, 60


@pytest.fixture
def config() -> Config:
    config = Config()
    config.model.seq_length, config.training.steps = LENGTH, STEPS
    config.training.global_batch_size = BATCH
    config.data.stage1 = [SourceConfig("web", weight=3.0), SourceConfig("pairs", weight=1.0)]
    config.data.reset_attention = False  # a run has settled it before it resumes
    config.optimizer.lr, config.optimizer.min_lr = 1e-2, 1e-3
    config.optimizer.lr_warmup_steps, config.optimizer.lr_decay_style = 10, "cosine"
    return config


def cosine(step: int, steps: int, peak: float = 1e-2) -> float:
    """The decay of the updates after 10 of warm-up, as docs/schedules.md states it."""
    progress = (step - 1 - 10) / (steps - 10)
    return 1e-3 + (peak - 1e-3) * (1 + math.cos(math.pi * progress)) / 2


def history(
    weights: dict[str, float],
    *,
    stage2: dict[str, float] | None = None,
    border: int = 0,
    batches=((0, 0, BATCH),),
) -> MixtureHistory:
    stages = [
        tuple(SourceWeight(key, weight, None) for key, weight in stage.items())
        for stage in (weights, stage2 or {})
    ]
    snapshot = SourceSnapshot("prefix", 0, 10, 1, None)
    sources = dict.fromkeys([*weights, *(stage2 or {})], snapshot)
    entry = MixtureEntry(0, MixtureWeights(*stages, 0.5, border, 0.0), sources, 64)
    sizes = tuple(BatchSize(*batch) for batch in batches)
    return MixtureHistory(1, LENGTH, False, (entry,), sizes, lr_warmup_begin=1)


BEFORE = history({"web": 3.0, "pairs": 1.0})


def lines(
    folder: Path,
    old: Config,
    new: Config,
    done: int,
    before: MixtureHistory = BEFORE,
    after: MixtureHistory | None = None,
    **state,
) -> list[str]:
    save_config(old, folder / "config.yaml")
    values = {"format": STATE_FORMAT, "step": done, "vocab_size": 9, "tokenizer_fingerprint": "f"}
    text = json.dumps({**values, "data": before.to_json(), **state})
    (folder / "state.json").write_text(text)
    reader = SimpleNamespace(history=after or before)
    return resume_lines(SimpleNamespace(checkpoint=folder, config=new, reader=reader))  # type: ignore


def test_nothing_changes(tmp_path, config) -> None:
    other = deepcopy(config)
    other.logging.run_dir = "moved"
    assert lines(tmp_path, config, other, 24) == [
        "resumes after step 24 of 60: 36 steps and 4,608 tokens left; no setting has changed"
    ]
    assert lines(tmp_path, config, config, 60)[0].startswith(
        "resumes after step 60 of 60: 0 steps and 0 tokens left; no"
    )


def test_a_run_that_begins_has_nothing_to_change(tmp_path, config) -> None:
    other = deepcopy(config)
    other.optimizer.lr = 1.0
    for state in ({"optimizer": False}, {"training_config": False}):
        assert lines(tmp_path, config, other, 24, **state) == []
    assert resume_lines(SimpleNamespace(checkpoint=None)) == []  # type: ignore[arg-type]


def test_a_finished_run_is_extended(tmp_path, config) -> None:
    longer = deepcopy(config)
    longer.training.steps = 100
    jump = f"{cosine(60, 60):.3g} at step 60 -> {cosine(61, 100):.3g} at step 61"
    assert lines(tmp_path, config, longer, 60) == [
        "resumes after step 60 of 100: 40 steps and 5,120 tokens left; from step 61 on it changes:",
        "  training.steps: 60 -> 100; left were 0 steps and 0 tokens",
        f"  learning rate: {jump} (the run so far ended at step 60); {cosine(100, 100):.3g} at the "
        f"last step 100 ({cosine(60, 60):.3g} at step 60 so far)",
    ]
    assert cosine(61, 100) > 3 * cosine(60, 60)


def test_a_run_is_extended_on_the_way(tmp_path, config) -> None:
    longer = deepcopy(config)
    longer.training.steps = 100
    found = lines(tmp_path, config, longer, 24)
    assert found[1] == "  training.steps: 60 -> 100; left were 36 steps and 4,608 tokens"
    assert (
        f"-> {cosine(25, 100):.3g} at step 25 (it would have been {cosine(25, 60):.3g})" in found[2]
    )


def test_the_schedule_changes(tmp_path, config) -> None:
    other = deepcopy(config)
    other.optimizer.lr, other.training.z_loss = 2e-2, 1e-4
    found = lines(tmp_path, config, other, 24)
    rates = [f"{rate:.3g}" for rate in (cosine(24, 60), cosine(25, 60, 2e-2), cosine(25, 60))]
    last = [f"{cosine(60, 60, peak):.3g}" for peak in (2e-2, 1e-2)]
    assert found[1] == (
        f"  learning rate: {rates[0]} at step 24 -> {rates[1]} at step 25 (it would have been "
        f"{rates[2]}); {last[0]} at the last step 60 ({last[1]} at step 60 so far)"
    )
    z_loss = f"training.z_loss {config.training.z_loss} -> 0.0001"
    assert found[2:] == [f"  settings: optimizer.lr 0.01 -> 0.02, {z_loss}"]
    other.optimizer.lr, other.optimizer.min_lr = 1e-2, 1e-2  # the next step differs too
    assert "learning rate" in lines(tmp_path, config, other, 24)[1]


def test_the_batch_size_changes(tmp_path, config) -> None:
    other = deepcopy(config)
    other.training.global_batch_size = 12
    after = history({"web": 3.0, "pairs": 1.0}, batches=((0, 0, 4), (24, 96, 12)))
    assert lines(tmp_path, config, other, 24, after=after) == [
        "resumes after step 24 of 60: 36 steps and 13,824 tokens left; from step 25 on it changes:",
        "  global batch size: 4 -> 12 sequences (128 -> 384 tokens per step)",
    ]
    growing = history({"web": 3.0, "pairs": 1.0}, batches=((0, 0, 4), (30, 120, 12)))
    assert lines(tmp_path, config, config, 24, after=growing)[1:] == [
        "  global batch size: 4 sequences as before; at the last step 4 -> 12"
    ]
    assert "no setting" in lines(tmp_path, config, config, 24, growing)[0]


def test_stage_2_stays_where_it_began(tmp_path, config) -> None:
    """The config alone would say that the last fifth of the longer run, 20 steps, is stage 2."""
    config.data.stage2 = [SourceConfig("better")]
    longer = deepcopy(config)
    longer.training.steps = 92
    weights = {"web": 3.0, "pairs": 1.0}
    before = history(weights, stage2={"better": 1.0}, border=48 * BATCH)
    found = lines(tmp_path, config, longer, 60, before)
    assert "  stage 2: 12 steps (49 to 60) -> 44 steps (49 to 92)" in found
    after = history(weights)
    assert "  stage 2: 12 steps (49 to 60) -> no steps" in lines(
        tmp_path, config, config, 24, before, after
    )


def test_the_mixture_changes(tmp_path, config) -> None:
    other = deepcopy(config)
    other.data.stage1 = [SourceConfig("code", weight=1.0), SourceConfig("web", weight=1.0)]
    other.data.stage2, other.data.stage2_share = [SourceConfig("better")], 0.5
    after = history({"code": 1.0, "web": 1.0}, stage2={"better": 2.0}, border=40 * BATCH)
    assert lines(tmp_path, config, other, 24, after=after)[1:] == [
        "  stage 2: no steps -> 20 steps (41 to 60)",
        "  mixture of stage 1: web 75.0% -> 50.0%, pairs is removed (it had 25.0%), code is new "
        "with 50.0%",
        "  mixture of stage 2: web 75.0% -> 25.0%, pairs is removed (it had 25.0%), code is new "
        "with 25.0%, better is new with 50.0%",
    ]
