"""Folders that transformers wrote: without our tokenizer's files, a decoder, or image weights."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.errors import ChameleonError, CheckpointError, DataError
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session
from megatron_chameleon.tokenizer.folder import load_tokenizer
from tiny_model import write_tokenizer

OURS = ("chameleon.json", "image_tokenizer", "text.model", "vocabulary.json", "SHA256SUMS")


def change_tensors(file: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_encoder(tensors: dict) -> None:
    for name in [name for name in tensors if "vqmodel" in name]:
        del tensors[name]


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As on a hub: what transformers reads, and nothing of ours."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    convert(tiny_checkpoint, folder, "hf", verify=False)
    for name in OURS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return folder


@pytest.fixture
def text_alone(published: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(published, tmp_path / "text"))
    change_tensors(folder / "model.safetensors", drop_encoder)
    return folder


def test_without_a_decoder_images_are_read_and_not_drawn(
    published: Path, tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = convert(published, tmp_path / "out", "megatron")
    assert result.verified
    (said,) = [r.getMessage() for r in caplog.records if "decoder" in r.getMessage()]
    assert said.endswith("no VQ decoder: images can be read and not drawn (--tokenizer brings one)")
    full, made = load_tokenizer(tiny_tokenizer), load_tokenizer(tmp_path / "out" / "tokenizer")
    assert made.vocabulary == full.vocabulary
    assert made.image and full.image
    assert (made.drawn_codes, full.drawn_codes) == (0, 16)
    image = torch.randint(256, (1, 8, 8, 3)).byte().numpy()
    assert made.image.encode_prepared(image).tolist() == full.image.encode_prepared(image).tolist()
    with pytest.raises(DataError, match=r"no decoder, so images can be read and not drawn\. Give"):
        made.image.decode(full.image.encode_prepared(image))
    with pytest.raises(CheckpointError, match="comes without a VQ decoder, which the format"):
        convert(tmp_path / "out", tmp_path / "meta", "meta")
    convert(tmp_path / "out", tmp_path / "again", "hf")
    own = open_tokenizer(open_checkpoint(tmp_path / "again"), None, tmp_path)
    assert own.fingerprint == made.fingerprint


def test_without_image_weights_a_model_knows_text_alone(text_alone: Path, tmp_path: Path) -> None:
    convert(text_alone, tmp_path / "out", "megatron")
    assert load_tokenizer(tmp_path / "out" / "tokenizer", images=None).image is None
    with pytest.raises(CheckpointError, match="comes without an image tokenizer"):
        convert(tmp_path / "out", tmp_path / "hf", "hf")


@pytest.mark.parametrize("kind", ["encoder", "text"])
def test_such_models_never_begin_an_image(
    published: Path, text_alone: Path, kind: str, tmp_path: Path
) -> None:
    """Begin-image has by far the largest logit wherever it is positive: in half of the steps."""
    folder = published if kind == "encoder" else text_alone
    session = Session.load(folder)
    vocabulary = session.tokenizer.vocabulary
    assert session.codes_per_image == 0
    head = session.model.lm_head.weight
    head.copy_(torch.zeros_like(head))
    head[vocabulary.begin_image] = 100 * torch.sign(torch.randn(head.shape[1]))
    options = GenerationOptions(temperature=1.0, max_tokens=12)
    (answer,) = session.generate([["digit"]], options)
    assert all(isinstance(part, str) for part in answer.content)
    lacks = {"encoder": "it has no decoder", "text": "the model has no image tokenizer"}[kind]
    with pytest.raises(DataError, match=f"image: {lacks}.*--tokenizer"):
        session.draw(["digit"])
    with pytest.raises(DataError, match=lacks):
        session.generate([["digit"]], GenerationOptions(force=Force.IMAGE))


CHANGES = {
    "encoder": (1, lambda weights: weights["encoder.conv_in.weight"].add_(1.0), "first is encoder"),
    "codebook": (
        1,
        lambda weights: weights["quantize.embedding.weight"].mul_(1.001),
        "first is quantize",
    ),
    "seed": (2, lambda weights: None, "tensors differ"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_with_another_encoder_is_refused(
    published: Path, tmp_path: Path, name: str
) -> None:
    seed, change, message = CHANGES[name]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", seed)
    change_tensors(tokenizer / "image.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        convert(published, tmp_path / "out", "megatron", tokenizer_folder=tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_same_encoder_for_images_of_another_size_is_refused(
    published: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Its weights are the same, and images would have other numbers of codes."""
    tokenizer = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    content = json.loads((tokenizer / "image.json").read_text())
    content["model"]["resolution"] = 16
    (tokenizer / "image.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"images have 16 pixels a side, and those of .* 8"):
        convert(published, tmp_path / "out", "megatron", tokenizer_folder=tokenizer)


def test_other_text_tokens_under_the_same_ids_are_refused(
    published: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    names = config["vocabulary_map"]
    first, second = [name for name in names if name.isalpha() and "IMGIMG" not in name][:2]
    names[first], names[second] = names[second], names[first]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ChameleonError, match=r"token \d+ is .*, and .*hf says"):
        convert(folder, tmp_path / "out", "megatron", tokenizer_folder=tiny_tokenizer)


def test_an_encoder_that_nothing_tells_is_named(
    text_alone: Path, tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        convert(text_alone, tmp_path / "out", "megatron", tokenizer_folder=tiny_tokenizer)
    assert "nothing in" in caplog.text and "is not checked" in caplog.text


def test_an_export_that_has_lost_its_image_tokenizer_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    convert(tiny_checkpoint, tmp_path / "hf", "hf", verify=False)
    shutil.rmtree(tmp_path / "hf" / "image_tokenizer")
    (tmp_path / "hf" / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"has no image\.json"):
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
