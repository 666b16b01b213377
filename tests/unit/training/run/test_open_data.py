"""Where a resumed run continues to read, by what its checkpoint records."""

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
from megatron_chameleon.training.run.open_data import open_reader
from tiny_model import IMAGE_CODES


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer, images=False)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> Config:
    with TokenFileWriter(tmp_path / "tokens", tokenizer) as writer:
        for i in range(40):
            text = IMAGE_CODES + 20 + (np.arange(30) + i) % 200
            writer.add(np.array([0, *text, 2]), 0)
        writer.commit()
    config = Config()
    config.model.seq_length = 16
    config.data.stage1 = [SourceConfig(str(tmp_path / "tokens"))]
    config.training.steps, config.training.global_batch_size = 12, 4
    return config


def checkpoint(folder: Path, **values: Any) -> Path:
    state = {"format": STATE_FORMAT, "step": 6, "vocab_size": 320, **values}
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def first_tokens(reader: BatchReader, steps_done: int) -> list[int]:
    return reader.batches_for(steps_done + 1, 0, 1)[0].tokens[0].tolist()


def test_a_run_continues_where_it_stopped_reading(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    whole = BatchReader(config, tokenizer)
    folder = checkpoint(tmp_path / "own", data=whole.state())
    config.training.global_batch_size = 8  # from here on, after 6 steps of 4 samples
    reader = open_reader(config, tokenizer, folder)
    assert first_tokens(reader, 6) == whole.sample(24).tokens.tolist()


def test_bare_weights_start_from_the_beginning(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    reader = open_reader(config, tokenizer, checkpoint(tmp_path / "weights", optimizer=False))
    assert first_tokens(reader, 0) == BatchReader(config, tokenizer).sample(0).tokens.tolist()


def test_a_run_of_another_program_continues_at_its_step(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    folder = checkpoint(tmp_path / "other", optimizer=True, training_config=False, data=None)
    reader = open_reader(config, tokenizer, folder)
    assert first_tokens(reader, 6) == BatchReader(config, tokenizer).sample(24).tokens.tolist()


def test_an_own_checkpoint_that_does_not_say(
    tmp_path: Path, config: Config, tokenizer: Any
) -> None:
    with pytest.raises(CheckpointError, match="it does not record what the run has read, because"):
        open_reader(config, tokenizer, checkpoint(tmp_path / "old"))
