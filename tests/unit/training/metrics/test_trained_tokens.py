"""The tokens that a run has trained on: counted on, gone back, and found where nothing has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chameleon.checkpoint.state.folders import STATE_FORMAT
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.training.metrics import trained_tokens
from megatron_chameleon.training.metrics.trained_tokens import find_trained_tokens
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.skipped_steps import SkippedSteps
from tiny_model import IMAGE_CODES


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer, images=False)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> Config:
    with TokenFileWriter(tmp_path / "tokens", tokenizer) as writer:
        for i in range(40):
            text = IMAGE_CODES + 20 + (np.arange(20 + i % 9) + i) % 200
            writer.add(np.array([0, *text, 2]), 0, answers=[(5, 17)] if i % 3 else [])
        writer.commit()
    config = Config()
    config.model.seq_length = 64
    config.data.stage1 = [SourceConfig(str(tmp_path / "tokens"))]
    config.training.steps, config.training.global_batch_size = 30, 4
    return config


def by_hand(reader: BatchReader, steps: int) -> int:
    """Labels in the loss of the first steps, from the batches that the engines get."""
    batches = (b for step in range(steps) for b in reader.batches_for(step + 1, 0, 1))
    return int(sum(batch.loss_mask.sum() for batch in batches))


def test_a_run_counts_on_from_its_checkpoint(config: Config, tokenizer: Tokenizer) -> None:
    reader = BatchReader(config, tokenizer)
    assert find_trained_tokens({}, reader).total == 0
    assert find_trained_tokens({"step": 9, "optimizer": False}, reader).total == 0
    found = find_trained_tokens({"step": 9, "trained_tokens": 123}, reader)
    found.add(7, is_skipped=False)
    found.add(1000, is_skipped=True)
    assert (found.total, found.note) == (130, "")


@pytest.mark.parametrize("value", [-1, 1.5, "7", True, [], {}])
def test_a_count_that_was_edited_is_refused(
    config: Config, tokenizer: Tokenizer, value: Any
) -> None:
    message = r"step 9: trained_tokens in its state\.json is .*, which is not a number of tokens"
    with pytest.raises(CheckpointError, match=message):
        state = {"step": 9, "trained_tokens": value}
        find_trained_tokens(state, BatchReader(config, tokenizer))


def test_a_checkpoint_without_a_count_is_counted_from_the_data(
    config: Config, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = BatchReader(config, tokenizer)
    exact = by_hand(reader, 30)
    assert 0 < exact < 0.8 * 30 * 4 * 64  # prompts and <s> do not count
    found = find_trained_tokens({"step": 30}, reader)
    assert found.total == exact
    assert found.note == (
        f"trained_tokens continues from {exact:,} ({100 * exact / 7680:.1f}% of 7,680 consumed "
        "tokens), counted in its 120 samples, because the checkpoint lacks it"
    )
    monkeypatch.setattr(trained_tokens, "MOST_COUNTED", 64)
    estimate = find_trained_tokens({"step": 30}, reader)
    assert estimate.total is not None
    assert abs(estimate.total - exact) < 0.05 * exact and estimate.total != exact
    assert "), estimated from 64 of its 120 samples, because" in estimate.note


def test_data_that_is_gone_leaves_the_count_unknown(
    tmp_path: Path, config: Config, tokenizer: Tokenizer
) -> None:
    """The files of a source that the run has left may be removed."""
    for path in tmp_path.glob("tokens.*"):
        (tmp_path / path.name.replace("tokens", "left")).write_bytes(path.read_bytes())
    config.data.stage1.append(SourceConfig(str(tmp_path / "left")))
    first = BatchReader(config, tokenizer)
    config.data.stage1.pop()
    second = BatchReader(config, tokenizer, first.state(), 9)
    for path in tmp_path.glob("left.*"):
        path.unlink()
    found = find_trained_tokens({"step": 20}, BatchReader(config, tokenizer, second.state(), 20))
    assert found.total is None
    assert found.note.startswith("trained_tokens is null: the checkpoint lacks it, and data: the")
    found.add(5, is_skipped=False)
    assert found.total is None


def test_a_step_is_counted_and_a_rollback_takes_it_back(
    tmp_path: Path, config: Config, tokenizer: Tokenizer
) -> None:
    reader = BatchReader(config, tokenizer)
    inputs = RunInputs(config, tokenizer, reader, None, SkippedSteps(), "auto")
    lines = [
        inputs.counted({"loss": 1.0, "loss_tokens": 100 * step, **extra}, step)
        for step, extra in ((1, {}), (2, {"skipped": True}), (3, {}))
    ]
    assert [line["trained_tokens"] for line in lines] == [100, 100, 400]
    assert lines[2] | {"loss": 1.0} == {
        **{"step": 3, "loss": 1.0, "consumed_samples": 12, "consumed_tokens": 768},
        "trained_tokens": 400,
    }
    entries = inputs.checkpoint_entries(3)
    assert entries["trained_tokens"] == 400
    state = {**entries, "format": STATE_FORMAT, "step": 3}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert inputs.counted({"loss_tokens": 50}, 4)["trained_tokens"] == 450
    back = inputs.rewound_to(tmp_path)
    assert back.counted({"loss_tokens": 7}, 4)["trained_tokens"] == 407
