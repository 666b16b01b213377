"""Optimizer state is converted if the format can store it, and it is compared."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.base import most_precise_row
from megatron_chameleon.checkpoint.formats.deepspeed_files import (
    find_step_folder,
    open_deepspeed_files,
)
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.optimizer_state import MOMENTS, optimizer_parts
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state import resume
from megatron_chameleon.checkpoint.state.integrity import SUMS_FILE
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.config.load import save_config
from megatron_chameleon.errors import CheckpointError
from tiny_model import (
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def bf16_checkpoint(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights in bf16, fp32 main weights and a training config of its own."""
    folder = tmp_path_factory.mktemp("bf16") / "step_00000007"
    main = random_tensors(model_config(), VOCAB_SIZE)
    weights = {name: tensor.bfloat16() for name, tensor in main.items()}
    write_checkpoint(folder, model_config(), weights, tiny_tokenizer, main_weights=main)
    config = TrainingCheckpoint(folder).config
    config.training.seed, config.training.global_batch_size = 5, 32
    config.training.dtype = "bf16"
    save_config(config, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def universal(bf16_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in DeepSpeed's format, which tests must not change."""
    folder = tmp_path_factory.mktemp("universal") / "deepspeed"
    assert convert(bf16_checkpoint, folder, "deepspeed").optimizer == "Optimizer state kept."
    return folder


def assert_same_state(first: Path, second: Path) -> None:
    """Weights, main weights and moments, bit for bit."""
    old, new = open_checkpoint(first), open_checkpoint(second)
    assert old.has_optimizer
    assert new.has_optimizer
    compared = 0
    for row in tensor_rows(old.dimensions):
        assert old.dtype(row) == new.dtype(row)
        for part in (None, *optimizer_parts(old.dtype(row))):
            wanted = replace(row, part=part)
            assert torch.equal(old.read(wanted), new.read(wanted)), wanted.key
            compared += 1
    assert compared in (3 * (3 + 3 * 10), 4 * (3 + 3 * 10))


def test_megatron_deepspeed_megatron(
    bf16_checkpoint: Path, universal: Path, tmp_path: Path
) -> None:
    convert(universal, tmp_path / "again", "megatron")
    assert_same_state(bf16_checkpoint, tmp_path / "again")
    old, new = (TrainingCheckpoint(path) for path in (bf16_checkpoint, tmp_path / "again"))
    assert new.config.training == old.config.training
    assert new.config.model == old.config.model
    expected = {"step": 7, "optimizer": True, "training_config": True}
    assert {key: new.state[key] for key in expected} == expected
    resume.check_fits(tmp_path / "again", old.config, new.state["tokenizer_fingerprint"])


def test_a_universal_checkpoint_has_what_deepspeed_looks_for(universal: Path) -> None:
    assert (universal / "latest_universal").read_text() == "global_step7"
    files = {path.name for path in (universal / "global_step7").iterdir()}
    assert files == {
        "zero",
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
    }
    folder = universal / "global_step7/zero/model.layers.1.self_attn.k_proj.weight"
    weight = torch.load(folder / "fp32.pt", weights_only=True)["param"]
    assert (weight.shape, weight.dtype) == ((24, 48), torch.float32)
    assert (
        folder / "fp32.pt"
    ).stat().st_size < 24 * 48 * 4 + 2000  # not the whole tensor that it is a view of
    assert torch.load(folder / "step.pt", weights_only=True) == 7
    # the encoder, which transformers trains if it gets gradients
    assert (universal / "global_step7/zero/model.vqmodel.quant_conv.bias/exp_avg.pt").is_file()


def test_state_that_a_format_cannot_store_is_omitted_with_a_message(
    universal: Path, tmp_path: Path
) -> None:
    result = convert(universal, tmp_path / "hf", "hf")
    assert result.optimizer == ("Optimizer state omitted: the Hugging Face format cannot store it.")
    result = convert(tmp_path / "hf", tmp_path / "back", "megatron")
    assert result.optimizer == "Optimizer state omitted: the source has none."
    state = json.loads((tmp_path / "back/state.json").read_text())
    assert (state["optimizer"], state["training_config"]) == (False, False)


def test_optimizer_state_can_be_left_out(bf16_checkpoint: Path, tmp_path: Path) -> None:
    result = convert(bf16_checkpoint, tmp_path / "weights", "megatron", optimizer=False)
    assert result.optimizer == "Optimizer state omitted, as requested."
    checkpoint = TrainingCheckpoint(tmp_path / "weights")
    assert checkpoint.optimizer_tensors == {}
    assert checkpoint.state["optimizer"] is False


def test_fp32_is_taken_from_the_main_weights(bf16_checkpoint: Path, tmp_path: Path) -> None:
    result = convert(bf16_checkpoint, tmp_path / "fp32", "megatron", dtype="fp32")
    assert result.largest_change is None
    main = random_tensors(model_config(), VOCAB_SIZE)
    checkpoint = TrainingCheckpoint(tmp_path / "fp32")
    assert all(torch.equal(checkpoint.read(name), main[name]) for name in checkpoint.tensors)
    assert {name.split(".")[2] for name in checkpoint.optimizer_tensors} == set(MOMENTS)
    # and back: the fp32 weight becomes the main weight of the bf16 weight
    convert(tmp_path / "fp32", tmp_path / "bf16", "megatron", dtype="bf16")
    assert_same_state(bf16_checkpoint, tmp_path / "bf16")


def test_optimizer_state_is_compared(
    bf16_checkpoint: Path, universal: Path, tmp_path: Path
) -> None:
    result = verify(bf16_checkpoint, universal)
    assert (result.differences, result.optimizer) == ([], True)
    assert result.tensors == 4 * (3 + 3 * 13)
    changed = Path(shutil.copytree(universal, tmp_path / "changed"))
    file = changed / "global_step7/zero/lm_head.weight/exp_avg_sq.pt"
    content = torch.load(file, weights_only=True)
    content["param"][3, 4] += 1e-3
    torch.save(content, file)
    result = verify(bf16_checkpoint, changed)
    assert [difference.name for difference in result.differences] == [
        "exp_avg_sq of lm_head.weight"
    ]
    # between different dtypes, the main weights are compared
    convert(bf16_checkpoint, tmp_path / "fp32", "megatron", dtype="fp32", verify=False)
    result = verify(tmp_path / "fp32", bf16_checkpoint)
    assert (result.differences, result.largest, result.optimizer) == ([], 0.0, True)


def test_a_missing_moment_is_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    main = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    weights = {name: tensor.bfloat16() for name, tensor in main.items()}
    source = write_checkpoint(tmp_path / "step_00000007", model_config(), weights, tiny_tokenizer)
    with pytest.raises(CheckpointError, match=r"tensor optimizer\.state\.fp32_param\.\S+ is miss"):
        open_checkpoint(source)


def test_training_from_elsewhere_resumes_with_any_batch_size(
    universal: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(universal, tmp_path / "copy"))
    for name in ("config.yaml", SUMS_FILE):  # as if someone else had trained it
        (copy / name).unlink()
    convert(copy, tmp_path / "megatron", "megatron")
    checkpoint = TrainingCheckpoint(tmp_path / "megatron")
    assert (checkpoint.state["optimizer"], checkpoint.state["training_config"]) == (True, False)
    config = TrainingCheckpoint(tiny_checkpoint).config
    config.training.global_batch_size, config.training.seed = 12, 34
    fingerprint = checkpoint.state["tokenizer_fingerprint"]
    resume.check_fits(tmp_path / "megatron", config, fingerprint)
    config.model.hidden_size = 96
    with pytest.raises(CheckpointError, match=r"hidden_size=48 \(your config: 96\)"):
        resume.check_fits(tmp_path / "megatron", config, fingerprint)


class _Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


ZERO = "global_step7/zero"
MODEL_STATES = "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "malicious": (
        lambda f: torch.save(
            {"param": _Runs(f.parent / "ran")}, f / ZERO / "lm_head.weight/fp32.pt"
        ),
        r"fp32\.pt: would run code when it is loaded \(it asks for",
    ),
    "malicious model": (
        lambda f: torch.save(_Runs(f.parent / "ran"), f / MODEL_STATES),
        r"mp_rank_00_model_states\.pt: would run code when it is loaded",
    ),
    "truncated": (
        lambda f: (f / ZERO / "lm_head.weight/exp_avg.pt").write_bytes(b"PK"),
        r"exp_avg\.pt: is not a complete zip archive",
    ),
    "missing": (
        lambda f: (f / ZERO / "lm_head.weight/fp32.pt").unlink(),
        r"lm_head\.weight: has no fp32\.pt",
    ),
    "missing parameter": (
        lambda f: shutil.rmtree(f / ZERO / "model.norm.weight"),
        r"the tensor model\.norm\.weight is missing",
    ),
    "missing moment": (
        lambda f: (f / ZERO / "lm_head.weight/exp_avg.pt").unlink(),
        r"exp_avg of lm_head\.weight has 0 of 15,360 elements",
    ),
    "wrong shape": (
        lambda f: torch.save({"param": torch.ones(5, 7)}, f / ZERO / "lm_head.weight/fp32.pt"),
        r"exp_avg of lm_head\.weight has 15,360 of 35 elements|lm_head\.weight is \[5, 7\]",
    ),
    "wrong latest": (
        lambda f: (f / "latest_universal").write_text("global_step8"),
        r"names 'global_step8', but there is no such step folder beside it",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_universal_checkpoints(universal: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    copy = Path(shutil.copytree(universal, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(copy, tmp_path / "out", "megatron")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # in particular, nothing "ran"


def test_names_behind_a_wrapper_are_read(universal: Path, tmp_path: Path) -> None:
    """torch.compile and data parallelism add a prefix to the parameters' names."""
    copy = Path(shutil.copytree(universal, tmp_path / "copy"))
    zero = copy / ZERO
    for path in [path for path in zero.iterdir() if path.is_dir()]:
        path.rename(path.with_name(f"module.{path.name}"))
    for path in (copy / "global_step7").glob("*_states.pt"):
        path.unlink()
    step = find_step_folder(copy)
    assert step is not None
    assert open_deepspeed_files(step).step == 7
    reader = open_checkpoint(copy)
    first = next(tensor_rows(reader.dimensions))
    assert reader.dtype(first) == torch.float32  # no file says that it was bf16
    expected = random_tensors(model_config(), VOCAB_SIZE)["embedding.word_embeddings.weight"]
    assert torch.equal(reader.read(most_precise_row(reader, first, torch.float32)), expected)
