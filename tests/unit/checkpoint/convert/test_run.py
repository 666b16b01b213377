"""The exported folder: what is in it, and what is refused."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_chameleon.checkpoint.convert.plan import plan_conversion
from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats import hf, load_format
from megatron_chameleon.checkpoint.formats.hf_config import vocabulary_map
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state.integrity import SUMS_FILE
from megatron_chameleon.checkpoint.tensor_files.safetensors import (
    SafetensorsReader,
    SafetensorsWriter,
)
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names
from tiny_model import (
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
    write_tokenizer,
)


def test_the_folder_has_everything(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = convert(tiny_checkpoint.parents[1], tmp_path / "hf", "hf")
    files = {str(path.relative_to(tmp_path / "hf")) for path in (tmp_path / "hf").rglob("*")}
    assert files >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "chameleon.json",
        "text.model",
        "vocabulary.json",
        "image_tokenizer/image.json",
        "image_tokenizer/image.safetensors",
    }
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir() if path.is_file()}
    assert len(modes) == 1  # anyone who may read one file may read all of them
    assert result.verified
    assert (result.step, result.source) == (7, tiny_checkpoint)
    expected = random_tensors(model_config(), VOCAB_SIZE)
    assert result.parameters == sum(tensor.numel() for tensor in expected.values())
    assert result.total_bytes == (tmp_path / "hf/model.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]  # nothing temporary is left


@pytest.mark.parametrize("to", ["hf", "meta", "megatron", "deepspeed"])
def test_every_file_has_a_checksum(to: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / to
    convert(tiny_checkpoint, folder, to)
    folder = next(folder.rglob(SUMS_FILE)).parent
    command = ["sha256sum", "--check", "--quiet", "--strict", SUMS_FILE]
    subprocess.run(command, cwd=folder, check=True)
    listed = {line[66:] for line in (folder / SUMS_FILE).read_text().splitlines()}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert listed == files - {SUMS_FILE}


def test_a_damaged_source_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One flipped bit of a weight, which no size and no name reveals."""
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    file = tmp_path / "hf/model.safetensors"
    content = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + header_bytes])["lm_head.weight"]["data_offsets"][0]
    content[8 + header_bytes + place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert not (tmp_path / "meta").exists()
    convert(tmp_path / "hf", tmp_path / "meta", "meta", verify=False)
    assert not (tmp_path / "meta" / SUMS_FILE).exists()


def test_config_says_what_the_model_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    vocabulary = Vocabulary.load(tmp_path / "hf")
    expected = {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "swin_norm": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["vocabulary_map"]["<image>"] == vocabulary.image_placeholder
    assert config["vocabulary_map"]["IMGIMGBCZ"] == vocabulary.code_token_ids[12]
    assert len(config["vocabulary_map"]) == VOCAB_SIZE


def test_hf_encodes_images_to_our_codes(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """transformers' VQ-VAE with the exported weights gives our image tokenizer's ids."""
    from PIL import Image
    from transformers import ChameleonForConditionalGeneration

    from megatron_chameleon.tokenizer.folder import load_tokenizer
    from megatron_chameleon.tokenizer.image.tokenizer import prepare_image, to_pixels

    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    model = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert tokenizer.image is not None
    noise = torch.randint(256, (8, 8, 8, 3), generator=torch.Generator().manual_seed(1))
    images = [Image.fromarray(n.numpy().astype("uint8")) for n in noise]
    pixels = torch.cat([to_pixels(prepare_image(image, 8)[None]) for image in images])
    codes = tokenizer.image.encode(images)
    assert len(set(codes.ravel().tolist())) > 4
    expected = tokenizer.vocabulary.codes_to_token_ids(codes)
    assert model.get_image_tokens(pixels).tolist() == expected.tolist()


def test_shards_and_index_hold_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = convert(tiny_checkpoint, tmp_path / "one", "hf")
    many = convert(tiny_checkpoint, tmp_path / "many", "hf", shard_bytes=100_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    headers = sum(file_header_bytes(path) for path in (tmp_path / "many").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == many.total_bytes - headers
    assert one.total_bytes - file_header_bytes(tmp_path / "one/model.safetensors") == (
        many.total_bytes - headers
    )
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        # The header comes on top; 500 names of 50 letters are far below 50,000 bytes.
        assert (tmp_path / "many" / file).stat().st_size < 150_000
    first, second = SafetensorsReader(tmp_path / "one"), SafetensorsReader(tmp_path / "many")
    assert first.shapes.keys() == second.shapes.keys() == index["weight_map"].keys()
    for name in first.shapes:
        assert torch.equal(first.read(name), second.read(name))


def file_header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_bf16_casts_the_transformer_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = convert(tiny_checkpoint, tmp_path / "hf", "hf", dtype="bf16")
    stored = SafetensorsReader(tmp_path / "hf")
    expected = random_tensors(model_config(), PADDED_VOCAB_SIZE)["output_layer.weight"].bfloat16()
    assert torch.equal(stored.read("lm_head.weight"), expected[:VOCAB_SIZE])
    assert stored.read("model.vqmodel.quantize.embedding.weight").dtype == torch.float32
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    assert result.largest_change is not None
    change, name = result.largest_change
    dims = Dimensions.of(model_config(), VOCAB_SIZE, 2, 2)
    assert name in {row.key for row in tensor_rows(dims)}
    assert 2**-9 < change <= 2**-8  # half a step of 8 significant bits, seen in 60,000 numbers


def test_an_existing_destination_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"hf: already exists"):
        convert(tiny_checkpoint, tmp_path / "hf", "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def test_a_failure_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_tokenizer", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        convert(tiny_checkpoint, tmp_path / "hf", "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "deepspeed"])
def test_settings_that_transformers_refuses_are_found_before_tensors_are_written(
    to: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: object) -> object:
        from transformers import ChameleonConfig

        return ChameleonConfig(hidden_size="wide")

    def write(*args: object) -> None:
        pytest.fail("a tensor is written")

    monkeypatch.setattr(hf, "build_config", build)
    monkeypatch.setattr(load_format(to).Writer, "write", write)
    with pytest.raises(CheckpointError, match=r"refuses .*'hidden_size'.* or use --to megatron"):
        convert(tiny_checkpoint, tmp_path / "new", to)
    with pytest.raises(CheckpointError, match="hidden_size"):  # --dry-run
        plan_conversion(tiny_checkpoint, tmp_path / "new", to)
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_one_token_generates_one(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = replace(model_config(), seq_length=1)
    tensors = random_tensors(model, VOCAB_SIZE)
    source = write_checkpoint(tmp_path / "step_00000007", model, tensors, tiny_tokenizer)
    convert(source, tmp_path / "hf", "hf", verify=False)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["max_new_tokens"] == 1


def test_a_tensor_that_changed_on_the_disk_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SafetensorsWriter.write

    def damage(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        is_target = name == "model.layers.1.mlp.up_proj.weight"
        write(self, name, tensor * 1.001 if is_target else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", damage)
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight\[1\] differs after writing"):
        convert(tiny_checkpoint, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
    convert(tiny_checkpoint, tmp_path / "hf", "hf", verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_layer.weight": None}, r"the tensor output_layer\.weight is missing"),
        ({"output_layer.bias": torch.zeros(8)}, r"output_layer\.bias \[8\] has no place in"),
        (
            {"decoder.final_layernorm.weight": torch.ones(32)},
            r"final_layernorm\.weight is \[32\], its config says \[48\]",
        ),
        (
            {"embedding.word_embeddings.weight": torch.ones(300, 48)},
            r"word_embeddings\.weight is \[300, 48\], its config says \[320, 48\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tiny_tokenizer: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    model = model_config()
    tensors = {**random_tensors(model, VOCAB_SIZE), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    source = write_checkpoint(tmp_path / "step_00000007", model, kept, tiny_tokenizer)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "hf", "hf")


def test_a_model_without_qk_norm_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = model_config(qk_norm_groups=0)
    tensors = random_tensors(model, VOCAB_SIZE)
    source = write_checkpoint(tmp_path / "step_00000007", model, tensors, tiny_tokenizer)
    with pytest.raises(CheckpointError, match=r"no QK-norm .* cannot leave it out"):
        convert(source, tmp_path / "hf", "hf")


def test_another_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match=r"its fingerprint is \w{12}, .* trained with \w{12}"):
        convert(tiny_checkpoint, tmp_path / "hf", "hf", tokenizer_folder=other)


def test_a_tokenizer_that_moved_away_is_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "step_00000007"))
    config = (source / "config.yaml").read_text()
    path = next(line for line in config.splitlines() if line.startswith("  path:"))
    (source / "config.yaml").write_text(config.replace(path, "  path: gone/tokenizer"))
    with pytest.raises(CheckpointError, match=r"'gone/tokenizer' is not a folder.*--tokenizer"):
        convert(source, tmp_path / "hf", "hf")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--to onnx: Unknown format\. Use one of megatron"):
        convert("anywhere", "nowhere", "onnx")


def test_a_text_piece_that_looks_like_a_code_is_not_in_the_map() -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>", *control_names(12), "IMGIMGBZx", "b"]
    names_to_ids = vocabulary_map(Vocabulary.from_tokens(names))
    assert "IMGIMGBZx" not in names_to_ids
    assert names_to_ids["IMGIMGBBZ"] == 4 + 11
    assert names_to_ids["b"] == len(names) - 1
