"""A checkpoint says whether its model was trained on conversations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chameleon.checkpoint.state.folders import trained_on_conversations
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.skipped_steps import SkippedSteps
from tiny_model import IMAGE_CODES


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer, images=False)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> Config:
    """Documents in stage 1; some conversations in stage 2, which has the last 2 of 10 steps."""
    for name, answers in (("documents", []), ("talks", [(5, 17)])):
        with TokenFileWriter(tmp_path / name, tokenizer) as writer:
            for i in range(40):
                ids = [0, *(IMAGE_CODES + 20 + (np.arange(25) + i) % 200), 2]
                writer.add(np.array(ids), 0, answers=answers if i % 3 else [])
            writer.commit()
    config = Config()
    config.model.seq_length = 64
    config.data.stage1 = [SourceConfig(str(tmp_path / "documents"))]
    config.data.stage2 = [SourceConfig(str(tmp_path / "talks"))]
    config.training.steps, config.training.global_batch_size = 10, 4
    return config


def entries(config: Config, tokenizer: Tokenizer, step: int, before: bool = False) -> Any:
    reader = BatchReader(config, tokenizer)
    inputs = RunInputs(
        *(config, tokenizer, reader, None, SkippedSteps(), "auto"), conversations=before
    )
    return inputs.checkpoint_entries(step)


def test_conversations_count_from_the_stage_that_reads_them(
    config: Config, tokenizer: Tokenizer
) -> None:
    said = [entries(config, tokenizer, step)["trained_on_conversations"] for step in range(1, 11)]
    assert said == [False] * 8 + [True] * 2


def test_what_the_weights_know_from_an_earlier_run_stays(
    config: Config, tokenizer: Tokenizer
) -> None:
    assert entries(config, tokenizer, 1, before=True)["trained_on_conversations"] is True


def test_older_checkpoints_are_told_by_their_token_files(
    tmp_path: Path, config: Config, tokenizer: Tokenizer
) -> None:
    state = entries(config, tokenizer, 10)
    del state["trained_on_conversations"]
    assert trained_on_conversations(state) is True
    state["data"]["entries"][0]["sources"].pop(str(tmp_path / "talks"))
    assert trained_on_conversations(state) is False
    (tmp_path / "documents.json").unlink()
    assert trained_on_conversations(state) is None


NAMES_NONE = {"entries": [7, {"sources": [1]}, {"sources": {"a": 1, "b": {"prefix": 2}}}]}


@pytest.mark.parametrize("data", [None, {}, NAMES_NONE])
def test_a_checkpoint_that_names_no_token_files_does_not_say(data: Any) -> None:
    assert trained_on_conversations({"data": data}) is None
