"""Meta's tokenizer folder: ``text_tokenizer.json``, ``vqgan.ckpt`` and ``vqgan.yaml``.

Ours has a sentencepiece model in place of the first and safetensors in place of the second. Our
``text.model``, ``vocabulary.json`` and ``image.json`` are kept beside Meta's files, so that a
tokenizer that we wrote is read back byte for byte. Source of the names: image_tokenizer.py,
vqgan.py of facebookresearch/chameleon.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from megatron_chameleon.checkpoint.formats.base import check_names
from megatron_chameleon.checkpoint.tensor_files.pth import PthFile
from megatron_chameleon.config.reading.yaml_file import read_yaml
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.files import read_bytes, write_bytes, write_text
from megatron_chameleon.tokenizer.common.files import tokenizer_file
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image.facts import vqgan_config
from megatron_chameleon.tokenizer.image.stored import IMAGE_CONFIG_FILE, save_vqgan
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.model_file import sentencepiece_from_huggingface
from megatron_chameleon.tokenizer.text.tokenizer import TEXT_MODEL_FILE, TextTokenizer
from megatron_chameleon.values import Values

META_TEXT_FILE, VQGAN_FILE, VQGAN_CONFIG_FILE = "text_tokenizer.json", "vqgan.ckpt", "vqgan.yaml"
_DDCONFIG = {
    "resolution": "resolution",
    "in_channels": "in_channels",
    "ch": "base_channels",
    "ch_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "z_channels",
    "dropout": "dropout",
}
"""Meta's names of the network's sizes, and ours."""
_KEPT = (TEXT_MODEL_FILE, VOCABULARY_FILE, IMAGE_CONFIG_FILE)


def write_meta_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as Meta's code reads it, and beside it what Meta's files cannot store.

    Args:
        tokenizer: The tokenizer, with its image tokenizer.
        folder: A folder that does not exist yet.
    """
    from megatron_chameleon.tokenizer.huggingface import fast_tokenizer

    assert tokenizer.image is not None and tokenizer.image.vqgan is not None
    vqgan = tokenizer.image.vqgan
    folder.mkdir()
    fast_tokenizer(tokenizer).backend_tokenizer.save(str(folder / META_TEXT_FILE))
    weights = vqgan.state_dict()
    torch.save({"state_dict": {n: t.cpu() for n, t in weights.items()}}, folder / VQGAN_FILE)
    content = {"model": {"params": _vqgan_params(vqgan.config)}}
    text = yaml.safe_dump(content, sort_keys=False)
    write_text(folder / VQGAN_CONFIG_FILE, text)
    for name in _KEPT:
        shutil.copyfile(tokenizer_file(tokenizer.folder, name), folder / name)


def read_meta_tokenizer(folder: Path, output: Path) -> Path:
    """Make our tokenizer folder from Meta's.

    Args:
        folder: Meta's tokenizer folder, written by us or by others.
        output: Our tokenizer folder; it is created if missing.

    Returns:
        ``output``.

    Raises:
        CheckpointError: The image tokenizer's files are missing, damaged or do not fit.
        DataError: The vocabulary cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (folder / TEXT_MODEL_FILE).is_file() and (folder / VOCABULARY_FILE).is_file():
        for name in (TEXT_MODEL_FILE, VOCABULARY_FILE):
            write_bytes(output / name, read_bytes(folder / name))  # which limits their size
    else:
        model = sentencepiece_from_huggingface(folder / META_TEXT_FILE)
        write_bytes(output / TEXT_MODEL_FILE, model)
        Vocabulary.from_tokens(TextTokenizer(model).tokens, where=str(folder)).save(output)
    config = _read_vqgan_config(folder / VQGAN_CONFIG_FILE)
    save_vqgan(_read_vqgan(folder / VQGAN_FILE, config), output)
    if (folder / IMAGE_CONFIG_FILE).is_file():
        write_bytes(output / IMAGE_CONFIG_FILE, read_bytes(folder / IMAGE_CONFIG_FILE))
    return output


def meta_encoder(folder: Path) -> Mapping[str, Callable[[], torch.Tensor]]:
    """How to read each tensor of the encoder of Meta's tokenizer.

    Args:
        folder: Meta's tokenizer folder.

    Raises:
        CheckpointError: ``vqgan.ckpt`` is missing or damaged.
    """
    file = PthFile(folder / VQGAN_FILE)
    others = ("loss.", "decoder.")
    names = (name for name in file.tensors if not name.startswith(others))
    return {name: partial(file.read, name) for name in names}


def _read_vqgan(path: Path, config: VqganConfig) -> Vqgan:
    file = PthFile(path)
    # without the discriminator and the perceptual loss, which only its training needed
    names = [name for name in file.tensors if not name.startswith("loss.")]
    with torch.device("meta"):
        model = Vqgan(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(str(path), {name: file.tensors[name].shape for name in names}, expected)
    model.load_state_dict({name: file.read(name) for name in names}, assign=True)
    return model


def _vqgan_params(config: VqganConfig) -> dict[str, Any]:
    return {
        "embed_dim": config.embed_dim,
        "n_embed": config.codebook_size,
        "ddconfig": {
            "double_z": False,
            "z_channels": config.z_channels,
            "resolution": config.resolution,
            "in_channels": config.in_channels,
            "out_ch": config.in_channels,
            "ch": config.base_channels,
            "ch_mult": list(config.ch_mult),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": [],
            "dropout": config.dropout,
        },
    }


def _read_vqgan_config(path: Path) -> VqganConfig:
    remedy = "Copy the file from the same place as vqgan.ckpt"
    try:
        content = OmegaConf.to_container(read_yaml(path), resolve=False)
    except ConfigError as error:
        raise CheckpointError(error.where, error.what, remedy) from error
    assert isinstance(content, dict)
    params = Values(content, str(path), remedy).section("model").section("params")
    values = params.section("ddconfig")
    if values.content.get("double_z") or values.content.get("attn_resolutions"):
        raise CheckpointError(
            str(path),
            "double_z or attn_resolutions is set, which this image tokenizer does not have",
            "Give another tokenizer with --tokenizer",
        )
    of_network = {ours: values.content[meta] for meta, ours in _DDCONFIG.items() if meta in values}
    of_codebook = {
        "embed_dim": params.whole("embed_dim"),
        "codebook_size": params.whole("n_embed"),
    }
    return vqgan_config(Values({**of_network, **of_codebook}, str(path), remedy))
