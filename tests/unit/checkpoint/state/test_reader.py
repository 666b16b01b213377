"""Checkpoints that megatron-core wrote are read, and those that are not whole are refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_chameleon.checkpoint.state.line import find_checkpoint
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.errors import CheckpointError
from tiny_model import (
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage, in a run folder."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "run/checkpoints/step_00000007"))


def test_every_tensor_is_read_as_it_was_saved(tiny_checkpoint: Path) -> None:
    checkpoint = TrainingCheckpoint(tiny_checkpoint)
    tensors = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_a_prefix_of_the_names_is_cut(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = model_config()
    tensors = random_tensors(model, VOCAB_SIZE)
    folder = tmp_path / "step_00000007"
    write_checkpoint(folder, model, tensors, tiny_tokenizer, prefix="model.")
    checkpoint = TrainingCheckpoint(folder)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_one_layer_is_read_alone(tiny_checkpoint: Path) -> None:
    name = "decoder.layers.mlp.linear_fc1.weight"
    tensors = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    checkpoint = TrainingCheckpoint(tiny_checkpoint)
    for layer in range(3):
        assert torch.equal(checkpoint.read(name, layer), tensors[name][layer])


def test_state_and_config_come_with_it(tiny_checkpoint: Path) -> None:
    checkpoint = TrainingCheckpoint(tiny_checkpoint)
    assert (checkpoint.state["step"], checkpoint.state["vocab_size"]) == (7, VOCAB_SIZE)
    assert checkpoint.config.model == model_config()


def test_no_process_group_is_left_or_needed(tiny_checkpoint: Path) -> None:
    assert not torch.distributed.is_initialized()
    TrainingCheckpoint(tiny_checkpoint).read("output_layer.weight")
    assert not torch.distributed.is_initialized()


def test_the_newest_whole_step_of_a_run_is_found(copy: Path) -> None:
    run = copy.parents[1]
    unfinished = copy.with_name("step_00000012")
    newer = copy.with_name("step_00000010")
    shutil.copytree(copy, newer)
    shutil.copytree(copy, unfinished)
    (unfinished / "state.json").unlink()
    assert find_checkpoint(run) == find_checkpoint(copy.parent) == newer
    assert find_checkpoint(copy) == copy


def test_a_step_that_is_not_whole_is_refused(copy: Path) -> None:
    (copy / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"not whole: it has no state\.json"):
        find_checkpoint(copy)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .* \(1 step folders without"):
        find_checkpoint(copy.parents[1])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ('{"format": "other/2"}', "format is 'other/2', this version reads"),
        ('{"format": "megatron_chameleon.checkpoint/1"}', "step is missing"),
    ],
)
def test_a_broken_state_is_refused(copy: Path, content: str, message: str) -> None:
    (copy / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        TrainingCheckpoint(copy)


def test_a_missing_config_is_refused(copy: Path) -> None:
    (copy / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        TrainingCheckpoint(copy)


def test_a_missing_data_file_is_named(copy: Path) -> None:
    files = sorted(copy.glob("*.distcp"))
    files[0].unlink()
    with pytest.raises(CheckpointError, match=rf"1 of {len(files)} data files are missing.*__0_0"):
        TrainingCheckpoint(copy)


def test_a_cut_data_file_is_refused(copy: Path) -> None:
    for file in copy.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"distcp: has [\d,]+ bytes, but a chunk of it ends"):
        TrainingCheckpoint(copy)


def test_an_unknown_tensor_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no tensor output_layer\.bias"):
        TrainingCheckpoint(tiny_checkpoint).read("output_layer.bias")


class _Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def test_metadata_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / ".metadata").write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        TrainingCheckpoint(copy)
    assert not (tmp_path / "ran").exists()


def test_cut_metadata_is_refused(copy: Path) -> None:
    content = (copy / ".metadata").read_bytes()
    (copy / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        TrainingCheckpoint(copy)


def test_state_says_the_true_vocabulary(copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    assert TrainingCheckpoint(copy).tensors["output_layer.weight"].shape[0] > state["vocab_size"]
