"""We read the files that DeepSpeed 0.19.8 itself writes, and it loads ours.

The reference is what DeepSpeed reports for every parameter (``safe_get_full_fp32_param`` and
related functions).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT, MOMENTS
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.config.load import save_config
from megatron_chameleon.errors import CheckpointError
from places import PROGRAMS
from run_command import environment
from run_layouts import make_config
from train_deepspeed import FIRST_TEXT_ID, OWN_MODEL, SAVED_STEP, VOCABULARY

STEP = f"global_step{SAVED_STEP}"
# name: ZeRO stage, dtype, ranks
TRAINED = {
    "zero1": (1, "fp32", 2),
    "zero1-bf16": (1, "bf16", 2),
    "zero2": (2, "bf16", 3),
    "zero3": (3, "fp32", 2),
    "zero3-bf16": (3, "bf16", 3),
}
OWN = "own-names"


@dataclass(frozen=True)
class Trained:
    """Checkpoints of plain DeepSpeed, each in a folder with its name, and their results."""

    folder: Path
    tokenizer: Path

    def losses(self, name: str) -> list[float]:
        return list(json.loads((self.folder / f"{name}.json").read_text()))

    def reference(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        return dict(torch.load(self.folder / f"{name}.pt", weights_only=True))

    def convert(self, name: str, destination: Path, to: str, **options: Any) -> None:
        convert(self.folder / name, destination, to, tokenizer_folder=self.tokenizer, **options)

    def train(self, jobs: list[dict[str, Any]]) -> None:
        plan = self.folder / "jobs.json"
        plan.write_text(json.dumps(jobs))
        script = PROGRAMS / "train_deepspeed.py"
        result = subprocess.run(
            [sys.executable, str(script), str(plan), str(self.folder)],
            capture_output=True,
            text=True,
            timeout=600,
            env=environment(),
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def job(name: str, model: Path | None, stage: int, **values: Any) -> dict[str, Any]:
    whole = {"processes": 2, "dtype": "fp32", "steps": 4, "load": None, "optimizer": True, **values}
    return {"name": name, "model": model and str(model), "stage": stage, **whole}


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("deepspeed")
    assert VOCABULARY > FIRST_TEXT_ID
    convert(tiny_checkpoint, folder / "hf", "hf", verify=False)
    done = Trained(folder, tiny_tokenizer)
    jobs = [
        job(name, folder / "hf", stage, dtype=dtype, processes=ranks)
        for name, (stage, dtype, ranks) in TRAINED.items()
    ]
    done.train([*jobs, job(OWN, None, 1)])
    for name in TRAINED:  # as `config.save_pretrained` would write it
        for place in (name, f"{name}-universal"):
            shutil.copy(folder / "hf/config.json", folder / place)
    save_config(make_config(OWN_MODEL), folder / OWN / "config.yaml")
    return done


@pytest.mark.parametrize("name", [*TRAINED, OWN])
def test_weights_and_moments_are_deepspeeds_own(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    trained.convert(name, tmp_path / "megatron", "megatron")
    reader = open_checkpoint(tmp_path / "megatron")
    assert (reader.step, reader.has_optimizer) == (SAVED_STEP, True)
    reference = trained.reference(name)
    is_bf16 = TRAINED.get(name, (1, "fp32", 2))[1] == "bf16"
    stored = TrainingCheckpoint(tmp_path / "megatron").tensors
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    assert {info.dtype for info in stored.values()} == {dtype}
    compared = 0
    for weight in tensor_rows(reader.dimensions):
        for part in (MAIN_WEIGHT, *MOMENTS):
            row = replace(weight, part=part if is_bf16 or part != MAIN_WEIGHT else None)
            tensor = reader.read(row)
            layer = f"decoder.layers.{row.layer}."
            own_name = row.megatron_name.replace("decoder.layers.", layer)
            named = {own_name: tensor} if name == OWN else row.to_hf(tensor)
            for parameter, found in named.items():
                assert torch.equal(found, reference[parameter][part]), (parameter, part)
                assert part == MAIN_WEIGHT or found.abs().max() > 0
                compared += 1
    others = [parameter for parameter in reference if "vqmodel" not in parameter]
    assert compared == 3 * len(others)


@pytest.mark.parametrize("name", TRAINED)
def test_universal_checkpoints_of_deepspeeds_tool_are_the_same(trained: Trained, name: str) -> None:
    result = verify(trained.folder / name, trained.folder / f"{name}-universal")
    assert result.differences == []
    assert result.optimizer
    assert result.tensors >= 3 * (3 + 3 * 13)  # weights and both moments


@pytest.fixture(scope="module")
def continued(trained: Trained) -> Trained:
    """DeepSpeed trains on from universal checkpoints that we write."""
    folder = trained.folder
    trained.convert("zero1", folder / "ours/megatron", "megatron")
    convert(folder / "ours/megatron", folder / "ours/universal", "deepspeed")
    convert(folder / "ours/megatron", folder / "ours/weights", "deepspeed", optimizer=False)
    trained.convert("zero3-bf16", folder / "ours/bf16", "deepspeed")
    load = {"load": str(folder / "ours/universal")}
    weights = {"load": str(folder / "ours/weights"), "optimizer": False}
    bf16 = {"load": str(folder / "ours/bf16"), "dtype": "bf16", "processes": 3}
    trained.train(
        [
            job("universal-zero1", folder / "hf", 1, **load),
            job("universal-zero3", folder / "hf", 3, **load),
            job("universal-zero3-steps", folder / "hf", 3, **load, own_steps=True),
            job("universal-bf16", folder / "hf", 2, **bf16),
            job("weights-zero1", folder / "hf", 1, **weights),
        ]
    )
    return trained


def test_deepspeed_resumes_from_what_we_write(continued: Trained) -> None:
    expected = continued.losses("zero1")[SAVED_STEP:]
    assert continued.losses("universal-zero1") == pytest.approx(expected, rel=1e-5)


def test_deepspeed_resumes_at_stage_3(continued: Trained) -> None:
    """DeepSpeed shares one step tensor between all groups, and torch's AdamW increments it once per
    group. The update is then off by 2e-5, also with DeepSpeed's own checkpoints. It is right when
    each group has its own step tensor."""
    expected = continued.losses("zero1")[SAVED_STEP:]
    assert continued.losses("universal-zero3") == pytest.approx(expected, rel=1e-4)
    assert continued.losses("universal-zero3-steps") == pytest.approx(expected, rel=1e-5)


def test_deepspeed_starts_from_weights_only(continued: Trained) -> None:
    expected = continued.losses("zero1")[SAVED_STEP:]
    found = continued.losses("weights-zero1")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] != pytest.approx(
        expected[1], rel=1e-4
    )  # different moments give a different update


def test_deepspeed_resumes_in_bf16_at_another_stage(continued: Trained) -> None:
    # bf16 rounds to 8 bits, and the stages sum in different orders.
    expected = continued.losses("zero3-bf16")[SAVED_STEP:]
    assert continued.losses("universal-bf16") == pytest.approx(expected, rel=3e-4)


class _Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def _change(path: Path, change: Callable[[dict], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optimizer_file(folder: Path, rank: int) -> Path:
    (path,) = folder.glob(f"{STEP}/*zero_pp_rank_{rank}_*optim_states.pt")
    return path


def model_file(folder: Path) -> Path:
    return next(iter(sorted(folder.glob(f"{STEP}/*model_states.pt"))))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "malicious": (
        lambda f: torch.save({"x": _Runs(f.parent / "ran")}, optimizer_file(f, 1)),
        r"optim_states\.pt: would run code when it is loaded \(it asks for",
    ),
    "truncated": (
        lambda f: optimizer_file(f, 0).write_bytes(optimizer_file(f, 0).read_bytes()[:-500]),
        r"optim_states\.pt: is not a complete zip archive",
    ),
    "missing rank": (
        lambda f: optimizer_file(f, 1).unlink(),
        r"has optimizer states of 1 ranks, but 2 ranks wrote them; that of rank 1 is missing",
    ),
    "no model": (lambda f: model_file(f).unlink(), "has no model states of rank 0"),
    "wrong latest": (
        lambda f: (f / "latest").write_text("../elsewhere"),
        r"names '\.\./elsewhere', but there is no such step folder beside it",
    ),
    "no settings": (lambda f: (f / "config.json").unlink(), r"without a config\.json here or in"),
    "tensor parallel": (
        lambda f: shutil.copy(model_file(f), f / STEP / "mp_rank_01_model_states.pt"),
        r"mp_rank_01_model_states\.pt is of a second tensor-parallel rank, which is not supported",
    ),
    "pipeline": (
        lambda f: shutil.copy(model_file(f), f / STEP / "layer_00-model_00-model_states.pt"),
        "a file of a model with pipeline stages or experts",
    ),
    "other model": (
        lambda f: _change(
            model_file(f), lambda c: c["module"].update({"model.extra.weight": torch.ones(3)})
        ),
        r"the tensor model\.extra\.weight \[3\] has no place in a Chameleon model",
    ),
    "other architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        r"model_type is 'llama', not 'chameleon'",
    ),
    "another version": (
        lambda f: _change(model_file(f), lambda c: c.pop("module")),
        r"differs from what DeepSpeed 0\.19 writes \(KeyError: 'module'\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(trained: Trained, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    copy = Path(shutil.copytree(trained.folder / "zero1", tmp_path / "copy"))
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(copy, tmp_path / "out", "megatron", tokenizer_folder=trained.tokenizer)
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # in particular, nothing "ran"
