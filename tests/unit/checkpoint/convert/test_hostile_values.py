"""Values that no checkpoint can have: one line each, before anything is built from them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.errors import ChameleonError, CheckpointError
from meta_files import MetaModel, random_shards, write_meta
from tiny_model import write_tokenizer


@pytest.fixture(scope="module")
def folders(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder of each format, which tests must not change."""
    place = tmp_path_factory.mktemp("sound")
    model = MetaModel(shards=2, norm_groups=2)
    write_meta(place / "models" / "meta", model, random_shards(model), tiny_tokenizer)
    for name in ("hf", "megatron", "deepspeed"):
        convert(tiny_checkpoint, place / name, name, verify=False)
    return {
        **{name: place / name for name in ("hf", "megatron", "deepspeed")},
        "meta": place / "models" / "meta",
    }


@pytest.fixture
def copies(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a folder that a test may damage."""

    def copy(name: str) -> Path:
        source = folders[name]
        if name == "meta":
            shutil.copytree(source.parents[1] / "tokenizer", tmp_path / "tokenizer")
            return Path(shutil.copytree(source, tmp_path / "models" / name))
        return Path(shutil.copytree(source, tmp_path / name))

    return copy


JSON_VALUES: list[tuple[str, str, tuple[str, ...], Any, str]] = [
    ("hf", "config.json", ("num_hidden_layers",), 10**8, "is 100000000, not a whole number from 1"),
    ("hf", "config.json", ("num_hidden_layers",), 1999, "states 1,999 layers, but the files have"),
    ("hf", "config.json", ("hidden_size",), -1, "hidden_size is -1, not a whole number from 1"),
    ("hf", "config.json", ("num_attention_heads",), 0, "num_attention_heads is 0, not a whole"),
    ("hf", "config.json", ("num_attention_heads",), 5, "does not divide into 5 heads of even"),
    ("hf", "config.json", ("num_key_value_heads",), 3, "4 heads are not divisible by 3 key/value"),
    ("hf", "config.json", ("intermediate_size",), 10**18, "intermediate_size is 10000000000000"),
    ("hf", "config.json", ("vq_config",), 5, "vq_config is 5, not an object"),
    (
        "hf",
        "config.json",
        ("vq_config", "channel_multiplier"),
        [10**9],
        "whole number from 1 to 64",
    ),
    ("hf", "config.json", ("vq_config", "base_channels"), 33, "33 is not a multiple of 32"),
    ("hf", "config.json", ("rms_norm_eps",), "nan", "rms_norm_eps is 'nan', not a number from"),
    ("hf", "config.json", ("rms_norm_eps",), float("inf"), "rms_norm_eps is inf, not a number"),
    ("hf", "config.json", ("rope_parameters",), [1], "rope_parameters is a list, not an object"),
    ("hf", "config.json", ("vocab_size",), True, "vocab_size is True, not a whole number"),
    ("hf", "config.json", ("swin_norm",), "no", "swin_norm is 'no', not true or false"),
    ("hf", "config.json", ("model_type",), {}, "model_type is an object, not 'chameleon'"),
    ("hf", "chameleon.json", ("model",), 3, "model is 3, not an object"),
    ("hf", "chameleon.json", ("step",), "many", "step is 'many', not a whole number"),
    ("hf", "chameleon.json", ("tokenizer_fingerprint",), 3, "tokenizer_fingerprint is 3, not a"),
    ("hf", "chameleon.json", ("model", "hidden_dropout"), 7.0, r"hidden_dropout: 7\.0 is not"),
    ("meta", "params.json", ("model",), 3, "model is 3, not an object"),
    ("meta", "params.json", ("model", "n_layers"), 10**8, "n_layers is 100000000, not a whole"),
    ("meta", "params.json", ("model", "n_layers"), 1000, "states 1,000 layers, but the files have"),
    ("meta", "params.json", ("model", "norm_eps"), None, "SOUND"),
    ("meta", "params.json", ("model", "norm_eps"), -1, "norm_eps is -1, not a number from"),
    ("meta", "params.json", ("model", "n_heads"), "8", "n_heads is '8', not a whole number"),
    ("meta", "consolidate_params.json", ("model_parallel_size",), 10**9, "from 1 to 1,024"),
    ("deepspeed", "chameleon.json", ("model",), 3, "model is 3, not an object"),
    ("deepspeed", "chameleon.json", ("skipped_steps",), [1, "x"], r"skipped_steps\[1\] is 'x'"),
    ("deepspeed", "config.json", ("num_hidden_layers",), 10**30, "num_hidden_layers is 1000000"),
    ("megatron", "state.json", ("step",), -1, "step is -1, not a whole number from 0"),
    ("megatron", "state.json", ("step",), 10**30, "step is 1000000000000000000000000000000"),
    ("megatron", "state.json", ("step",), None, "step is null"),
    ("megatron", "state.json", ("vocab_size",), 2**40, "vocab_size is 1099511627776, not a"),
    ("megatron", "state.json", ("optimizer",), "no", "optimizer is 'no', not true or false"),
    ("megatron", "tokenizer/image.json", ("model",), 5, "`model` has 5"),
    ("megatron", "tokenizer/image.json", ("model", "resolution"), 10**9, "from 1 to 16,384"),
    ("megatron", "tokenizer/image.json", ("model", "ch_mult"), [0], r"ch_mult\[0\] is 0, not a"),
]


def change(path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = json.loads(path.read_text())
    target = content
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("case", JSON_VALUES, ids=lambda case: f"{case[1]}-{case[2][-1]}")
def test_values_of_small_files(copies: Callable[[str], Path], tmp_path: Path, case: Any) -> None:
    name, file, keys, value, message = case
    source = copies(name)
    change(source / file, keys, value)
    if message == "SOUND":
        open_checkpoint(source)
        return
    with pytest.raises(ChameleonError, match=message) as error:
        convert(source, tmp_path / "out", "hf" if name == "megatron" else "megatron", verify=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


YAML_TEXTS = {
    "an environment variable": ("model: {num_layers: '${oc.env:HOME}'}", r"'\$\{oc\.env:HOME\}'"),
    "a nested one": ("tokenizer: {path: 'x${oc.decode:${oc.env:HOME}}'}", "ask for a resolver"),
    "a call": ("data: '${oc.create:{a:1}}'", "may not ask for a resolver"),
    "a tag": ("model: !!python/object/apply:os.system ['true']", r"config\.yaml:?\d?: .*tag"),
    "aliases": (
        "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)),
        "config.yaml",
    ),
    "a negative number": ("model: {num_layers: -3}", r"model\.num_layers: -3 is not"),
    "nan": ("model: {layernorm_epsilon: .nan}", r"model\.layernorm_epsilon: nan is not"),
    "no mapping": ("- 1", "the top level is not a mapping"),
    "deep lists": ("[" * 5000, "config.yaml"),
}


@pytest.mark.parametrize("name", YAML_TEXTS)
def test_a_checkpoints_config_is_taken_literally(
    copies: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = YAML_TEXTS[name]
    monkeypatch.setenv("HOME", "secret-of-this-machine")
    source = copies("megatron")
    (source / "config.yaml").write_text(text)
    with pytest.raises(ChameleonError, match=message) as error:
        open_checkpoint(source)
    assert "secret-of-this-machine" not in str(error.value)


def test_text_that_only_looks_like_a_reference_is_kept(copies: Callable[[str], Path]) -> None:
    source = copies("megatron")
    text = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(text.replace("run_dir: runs/default", "run_dir: ${HOME}"))
    reader = open_checkpoint(source)
    assert reader.config is not None and reader.config.logging.run_dir == "${HOME}"


def test_an_adapter_is_refused_and_other_weights_are_named(
    copies: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = copies("hf")
    for name in ("pytorch_model.bin", "ema.safetensors", "training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(b"")
    open_checkpoint(source)
    assert "files of weights that are not used: ema.safetensors, pytorch_model.bin" in caplog.text
    assert "training_args" not in caplog.text and "optimizer" not in caplog.text
    for name in ("adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.bin"):
        (source / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=rf"hf: has {name}: an adapter, .* Merge it"):
            convert(source, tmp_path / "out", "megatron")
        (source / name).unlink()


def test_links_as_in_a_cache_are_followed(copies: Callable[[str], Path], tmp_path: Path) -> None:
    """Hugging Face's cache keeps the files in ``blobs/`` and links to them in ``snapshots/``."""
    source = copies("hf")
    (tmp_path / "blobs").mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            blob = tmp_path / "blobs" / path.relative_to(source).as_posix().replace("/", "-")
            shutil.move(path, blob)
            path.symlink_to(os.path.relpath(blob, path.parent))
    convert(source, tmp_path / "out", "megatron")


def test_a_pipe_in_place_of_weights_ends_at_once(copies: Callable[[str], Path]) -> None:
    for name, file in (("hf", "model.safetensors"), ("meta", "consolidated.01.pth")):
        source = copies(name)
        (source / file).unlink()
        os.mkfifo(source / file)
        with pytest.raises(CheckpointError, match=r"not a regular file|shards are missing"):
            open_checkpoint(source)


@pytest.fixture
def foreign(copies: Callable[[str], Path]) -> Path:
    """A Hugging Face folder that others wrote: without our tokenizer."""
    source = copies("hf")
    for name in ("chameleon.json", "text.model", "vocabulary.json"):
        (source / name).unlink()
    shutil.rmtree(source / "image_tokenizer")
    return source


def test_another_encoder_is_refused_however_it_comes(
    foreign: Path,
    folders: dict[str, Path],
    copies: Callable[[str], Path],
    tiny_tokenizer: Path,
    tmp_path: Path,
) -> None:
    other = write_tokenizer(tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match=r"other: its image encoder is not that of .*/hf: "):
        convert(foreign, tmp_path / "out", "megatron", tokenizer_folder=other)
    meta = copies("meta")
    with pytest.raises(CheckpointError, match=r"other: its image encoder is not that of .*/meta: "):
        convert(meta, tmp_path / "out", "megatron", tokenizer_folder=other)
    sound = (tiny_tokenizer, folders["hf"], folders["megatron"], folders["meta"].parents[1])
    for number, tokenizer in enumerate(sound):  # ours, exported, in a checkpoint, Meta's
        convert(foreign, tmp_path / f"out{number}", "hf", tokenizer_folder=tokenizer)


def test_an_encoder_may_have_been_rounded(
    foreign: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """The released folder on Hugging Face's hub is bf16, Meta's encoder is fp32."""
    path = foreign / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(rounded, path, {"format": "pt"})
    convert(foreign, tmp_path / "out", "megatron", tokenizer_folder=tiny_tokenizer)
    rounded["model.vqmodel.quant_conv.bias"][0] += 0.5
    save_file(rounded, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of 57 tensors differ, the first is quant_conv"):
        convert(foreign, tmp_path / "out2", "megatron", tokenizer_folder=tiny_tokenizer)


def test_verify_never_calls_a_refused_tokenizer_equal(
    foreign: Path, folders: dict[str, Path], copies: Callable[[str], Path]
) -> None:
    assert verify(foreign, folders["hf"]).tokenizers.startswith("not compared")
    damaged = copies("megatron")
    torch.save([print], damaged / "tokenizer" / "image.safetensors")
    with pytest.raises(ChameleonError, match=r"image\.safetensors: cannot be read"):
        verify(damaged, folders["hf"])


def test_names_of_partial_folders_are_never_followed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("x")
    (tmp_path / ".out.partial").symlink_to(mine)
    with pytest.raises(CheckpointError, match=r"\.out\.partial: is a link.*another destination"):
        convert(folders["hf"], tmp_path / "out", "meta")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="out: is a link"):
        convert(folders["hf"], tmp_path / "out", "meta")
    inside = folders["hf"] / "new" / "out"
    with pytest.raises(CheckpointError, match=r"lies inside .*/hf, which is to be converted"):
        convert(folders["hf"], inside, "meta")
    with pytest.raises(CheckpointError, match="already exists"):
        convert(folders["hf"], folders["hf"], "meta")
    assert (mine / "precious").read_text() == "x"
    assert not inside.parent.exists()
