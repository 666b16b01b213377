"""Comparing checkpoints of different formats."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import fixed_document, largest_difference, verify
from megatron_chameleon.checkpoint.loading.transformers_model import load_transformers, logits
from megatron_chameleon.cli.main import main
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from meta_files import MetaModel, random_shards, write_meta
from tiny_model import PADDED_VOCAB_SIZE, model_config, random_tensors, write_checkpoint


@pytest.fixture(scope="module")
def hf_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "hf"
    convert(tiny_checkpoint, folder, "hf", verify=False)
    return folder


def test_a_checkpoint_equals_its_conversions(
    tiny_checkpoint: Path, hf_folder: Path, tmp_path: Path
) -> None:
    convert(hf_folder, tmp_path / "meta", "meta", verify=False)
    for other in (hf_folder, tmp_path / "meta", tiny_checkpoint.parents[1]):
        result = verify(tiny_checkpoint, other)
        assert (result.differences, result.largest) == ([], 0.0)
        assert result.tokenizers == "equal"
        assert result.logits is not None
        assert result.logits <= 1e-5  # the same model, computed in the same way
        with_moments = 3 if other == tiny_checkpoint.parents[1] else 1
        assert result.tensors == with_moments * (3 + 3 * 13)


def test_a_wrong_config_shows_in_the_logits(
    tiny_checkpoint: Path, hf_folder: Path, tmp_path: Path
) -> None:
    """The settings show it first. The document is long enough to reveal a wrong RoPE base."""
    copy = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
    content = json.loads((copy / "config.json").read_text())
    content["rope_parameters"]["rope_theta"] = 10001.0
    (copy / "config.json").write_text(json.dumps(content))
    result = verify(tiny_checkpoint, copy)
    assert [str(d) for d in result.differences] == ["rotary_base: 10000 and 10001"]
    document = fixed_document(Vocabulary.load(copy), 64)
    assert document.shape == (1, 64)
    first, second = (logits(load_transformers(path), document) for path in (hf_folder, copy))
    assert (first - second).abs().max() > 1e-5


def test_one_changed_number_is_found(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    tensors["decoder.layers.mlp.linear_fc1.weight"][1, 45, 7] += 1e-6
    other = tmp_path / "step_00000007"
    write_checkpoint(other, model_config(), tensors, tiny_tokenizer)
    result = verify(tiny_checkpoint, other)
    changed = "model.layers.1.mlp.up_proj.weight"  # and its moments, which are made from it
    names = [changed, f"exp_avg of {changed}", f"exp_avg_sq of {changed}"]
    assert [d.name for d in result.differences] == names
    assert 1e-7 < result.largest < 1e-5
    assert verify(tiny_checkpoint, other, tolerance=1e-5).differences == []
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tiny_checkpoint), str(other)])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert "model.layers.1.mlp.up_proj.weight: differs by" in output.out
    assert output.err.splitlines()[-1].startswith(
        f"error: {other}: differs from {tiny_checkpoint} in 3 places, the first is model.layers.1"
    )
    main(["verify", str(tiny_checkpoint), str(other), "--tolerance", "1e-5"])
    assert capsys.readouterr().out.startswith("equal: ")


def test_a_cast_is_within_half_a_step(
    tiny_checkpoint: Path, hf_folder: Path, tmp_path: Path
) -> None:
    convert(hf_folder, tmp_path / "bf16", "meta", dtype="bf16", verify=False)
    result = verify(tiny_checkpoint, tmp_path / "bf16", tolerance=2**-8)
    assert result.differences == []
    assert 2**-12 < result.largest <= 2**-8


def test_other_settings_are_named(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = MetaModel(shards=1, norm_groups=1, swin=True)
    other = write_meta(tmp_path / "models/7b", model, random_shards(model), None)
    result = verify(tiny_checkpoint, other)
    assert "num_layers: 3 and 2" in [str(difference) for difference in result.differences]
    assert "norm_order: pre and swin" in [str(difference) for difference in result.differences]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0]), 0.0),
        (torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0]).bfloat16(), 0.0),
        (torch.tensor([1.0, -2.0]), torch.tensor([1.5, -2.0]), 0.25),
        (torch.tensor([0.0]), torch.tensor([1.0]), torch.inf),
        (torch.tensor([1.0]), torch.tensor([torch.nan]), torch.inf),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), 0.0),
    ],
)
def test_how_a_difference_is_measured(
    first: torch.Tensor, second: torch.Tensor, expected: float
) -> None:
    assert largest_difference(first, second) == expected


def test_another_sign_of_zero_is_a_difference() -> None:
    assert largest_difference(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) > 0


def test_a_negative_tolerance_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tolerance -1: is below 0"):
        verify(tiny_checkpoint, tiny_checkpoint, tolerance=-1)
