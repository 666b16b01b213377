"""Round trips between all formats give the same bits, or an error that says why not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.meta import model_params
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.tensor_files.safetensors import SafetensorsReader
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.tokenizer.common.files import IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE
from megatron_chameleon.tokenizer.folder import fingerprint, load_tokenizer
from meta_files import MetaModel, load_shards, random_shards, same_shards, write_meta
from tiny_model import (
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
    write_tokenizer,
)


def test_hf_megatron_hf(tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    first, between, second = tmp_path / "first", tmp_path / "between", tmp_path / "second"
    convert(tiny_checkpoint, first, "hf")
    convert(first, between, "megatron")
    convert(between, second, "hf", shard_bytes=100_000)
    old, new = SafetensorsReader(first), SafetensorsReader(second)
    assert old.shapes == new.shapes
    assert all(torch.equal(old.read(name), new.read(name)) for name in old.shapes)
    names = {"config.json", "generation_config.json", "tokenizer.json", "processor_config.json"}
    for name in (*names, "image_tokenizer/image.safetensors", "text.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert fingerprint(between / "tokenizer") == fingerprint(tiny_tokenizer)
    assert TrainingCheckpoint(between).config.model == model_config()


def test_megatron_hf_megatron_keeps_tensors_and_settings(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "megatron")
    old, new = TrainingCheckpoint(tiny_checkpoint), TrainingCheckpoint(tmp_path / "again")
    assert old.config.model == new.config.model
    assert new.state["step"] == 7
    assert old.tensors.keys() == new.tensors.keys()
    for name, info in new.tensors.items():
        rows = info.shape[0]
        assert torch.equal(old.read(name)[:rows], new.read(name)), name


def test_meta_1_hf_meta_1(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = MetaModel(shards=1, norm_groups=1, dtype=torch.bfloat16)
    shards = random_shards(model)
    source = write_meta(tmp_path / "models/7b", model, shards, tiny_tokenizer)
    convert(source, tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    convert(tmp_path / "hf", tmp_path / "again", "meta")
    assert same_shards(load_shards(tmp_path / "again"), shards)
    assert {path.name for path in (tmp_path / "again/tokenizer").iterdir()} >= {
        "text_tokenizer.json",
        "vqgan.ckpt",
        "vqgan.yaml",
    }


@pytest.mark.parametrize("swin", [False, True])
def test_meta_4_megatron_meta_4(tiny_tokenizer: Path, tmp_path: Path, swin: bool) -> None:
    model = MetaModel(shards=4, norm_groups=4, swin=swin)
    shards = random_shards(model)
    source = write_meta(tmp_path / "models/30b", model, shards, tiny_tokenizer)
    convert(source, tmp_path / "megatron", "megatron")
    config = TrainingCheckpoint(tmp_path / "megatron").config.model
    assert (config.qk_norm_groups, config.num_query_groups) == (4, 4)
    assert config.norm_order == ("swin" if swin else "pre")
    result = convert(tmp_path / "megatron", tmp_path / "again", "meta")
    assert result.verified
    assert same_shards(load_shards(tmp_path / "again"), shards)
    params = json.loads((tmp_path / "again/params.json").read_text())["model"]
    old = json.loads((source / "params.json").read_text())["model"]
    assert {name: params[name] for name in old} == old
    size = json.loads((tmp_path / "again/consolidate_params.json").read_text())
    assert size == {"model_parallel_size": 4}


def test_meta_4_meta_2_meta_4_where_the_groups_allow(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = MetaModel(shards=4, norm_groups=2)
    shards = random_shards(model)
    source = write_meta(tmp_path / "models/30b", model, shards, tiny_tokenizer)
    convert(source, tmp_path / "two", "meta", shards=2)
    assert len(load_shards(tmp_path / "two")) == 2
    convert(tmp_path / "two", tmp_path / "four", "meta", shards=4)
    assert same_shards(load_shards(tmp_path / "four"), shards)


def test_meta_4_meta_2_is_refused_where_they_do_not(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = MetaModel(shards=4, norm_groups=4)
    source = write_meta(tmp_path / "models/30b", model, random_shards(model), tiny_tokenizer)
    with pytest.raises(CheckpointError, match=r"4 groups of QK-norms.*Use --shards 4, or a mult"):
        convert(source, tmp_path / "two", "meta", shards=2)
    with pytest.raises(CheckpointError, match=r"num_query_groups 4 is not divisible by 8 shards"):
        convert(source, tmp_path / "eight", "meta", shards=8)
    assert not list(tmp_path.glob("*two*"))


def test_groups_are_kept_although_their_norms_are_equal(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """In our own files, a model with four groups keeps four, even if they are still equal."""
    model = model_config(qk_norm_groups=4)
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    for name in tensors:
        if "q_layernorm" in name or "k_layernorm" in name:
            tensors[name] = tensors[name][:, :1].expand_as(tensors[name]).contiguous()
    source = write_checkpoint(tmp_path / "step_00000007", model, tensors, tiny_tokenizer)
    convert(source, tmp_path / "hf", "hf")
    assert open_checkpoint(tmp_path / "hf").model.qk_norm_groups == 4
    (tmp_path / "hf/chameleon.json").unlink()
    assert open_checkpoint(tmp_path / "hf").model.qk_norm_groups == 1


def test_a_cast_to_fp32_and_back_is_exact(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = MetaModel(shards=1, norm_groups=1, dtype=torch.bfloat16)
    shards = random_shards(model)
    source = write_meta(tmp_path / "models/7b", model, shards, tiny_tokenizer)
    up = convert(source, tmp_path / "up", "megatron", dtype="fp32")
    down = convert(tmp_path / "up", tmp_path / "down", "meta", dtype="bf16")
    assert up.largest_change is not None
    assert down.largest_change is not None
    assert (up.largest_change[0], down.largest_change[0]) == (0.0, 0.0)
    assert same_shards(load_shards(tmp_path / "down"), shards)


def test_a_number_beyond_fp16_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = MetaModel(shards=1, norm_groups=1)
    shards = random_shards(model)
    shards[0]["norm.weight"][3] = 70000.0
    source = write_meta(tmp_path / "models/7b", model, shards, tiny_tokenizer)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight: holds 7e\+04, .* float16"):
        convert(source, tmp_path / "hf", "hf", dtype="fp16")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("hidden", "ffn"), [(4096, 11008), (8192, 22016), (64, 48), (60, 7)])
def test_the_feed_forward_width_comes_out_of_the_settings(hidden: int, ffn: int) -> None:
    """Computed as the reference code does."""
    model = model_config()
    model.hidden_size, model.ffn_hidden_size = hidden, ffn
    params = model_params(model, Dimensions.of(model, VOCAB_SIZE, 1, 1))
    width = int(2 * 4 * params["dim"] / 3)
    if params["ffn_dim_multiplier"] is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple_of = params["multiple_of"]
    assert multiple_of * ((width + multiple_of - 1) // multiple_of) == ffn
    if hidden >= 4096:
        assert (params["ffn_dim_multiplier"], multiple_of) == (None, 256)


def test_a_folder_of_transformers_alone_takes_metas_tokenizer(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """A folder as downloaded has none of our files and no decoder."""
    model = MetaModel(shards=1, norm_groups=1)
    write_meta(tmp_path / "data/models/7b", model, random_shards(model), tiny_tokenizer)
    convert(tiny_checkpoint, tmp_path / "hf", "hf", verify=False)
    for name in ("chameleon.json", "text.model", "vocabulary.json", "image_tokenizer/image.json"):
        (tmp_path / "hf" / name).unlink()
    tokenizer = tmp_path / "data/tokenizer"
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron", tokenizer_folder=tokenizer)
    old, new = TrainingCheckpoint(tiny_checkpoint), TrainingCheckpoint(tmp_path / "megatron")
    for name, info in new.tensors.items():
        assert torch.equal(old.read(name)[: info.shape[0]], new.read(name)), name
    weights = tmp_path / "megatron/tokenizer/image.safetensors"
    assert weights.read_bytes() == (tiny_tokenizer / "image.safetensors").read_bytes()


@pytest.mark.parametrize("quantizer", ["lfq", "ibq"])
def test_a_vqgan_with_another_quantizer_travels_inside_the_hf_folder(
    quantizer: str, tmp_path: Path
) -> None:
    """transformers has Chameleon's quantizer alone, and gets zeros in place of the encoder."""
    ours = write_tokenizer(tmp_path / "tokenizer", quantizer=quantizer)
    model = model_config()
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    source = write_checkpoint(tmp_path / "run/step_00000007", model, tensors, ours)
    hf, again = tmp_path / "hf", tmp_path / "again"
    convert(source, hf, "hf")
    weights = SafetensorsReader(hf)
    encoder = [name for name in weights.shapes if name.startswith("model.vqmodel.encoder.")]
    assert encoder
    assert not any(weights.read(name).any() for name in encoder)
    card = (hf / "README.md").read_text(encoding="utf-8")
    assert f"`vqgan ({quantizer})`, in `image_tokenizer/`; transformers cannot read" in card

    convert(hf, again, "megatron")
    for name in (IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE):
        content = (ours / name).read_bytes()
        assert (hf / "image_tokenizer" / name).read_bytes() == content
        assert (again / "tokenizer" / name).read_bytes() == content
    noise = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    codes = []
    for folder in (ours, hf, again / "tokenizer"):
        image = load_tokenizer(folder).image
        assert image is not None
        codes.append(image.encode(images))
    assert len(np.unique(codes[0])) > 2
    assert (codes[0] == codes[1]).all()
    assert (codes[0] == codes[2]).all()

    for folder in (source, hf):
        with pytest.raises(CheckpointError) as caught:
            convert(folder, tmp_path / "meta", "meta")
        message = str(caught.value)
        assert f"the network of its image tokenizer is 'vqgan ({quantizer})'" in message
        assert message.endswith(". Use --to hf or --to megatron.")
        assert "\n" not in message
    assert not list(tmp_path.glob("*meta*"))
