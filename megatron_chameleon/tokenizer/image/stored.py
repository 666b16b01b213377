"""The files of an image tokenizer: image.json with its shape, and image.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import open_to_read, write_together
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
    read_checked_json,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.image.network import ImageNetwork
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.values import Values, printable

FORMAT = "megatron_chameleon.image_tokenizer/1"
MADE_BY = "chameleon tokenizer image"
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_network(folder: str | Path) -> ImageNetwork:
    """Read the network of FOLDER/image.json and FOLDER/image.safetensors.

    Raises:
        DataError: If one of them is missing or unreadable, or they do not belong together.
    """
    config = read_vqgan_config(folder)
    path = tokenizer_file(folder, IMAGE_WEIGHTS_FILE)
    remedy = f"Make it with `{MADE_BY}`"
    try:
        open_to_read(path).close()
        weights = load_file(path)
    except DataError as error:
        raise DataError(error.where, error.what, remedy) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(str(path), f"cannot be read ({first_line(error)[:200]})", remedy) from error
    has_decoder = any(name.startswith("decoder.") for name in weights)
    with torch.device("meta"):
        model = Vqgan(config, has_decoder=has_decoder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        name = wrong[0]
        raise DataError(
            str(path),
            f"{len(wrong)} tensors do not fit {IMAGE_CONFIG_FILE}: "
            f"{printable(name)} is {found.get(name, 'missing')}, "
            f"the config needs {expected.get(name, 'none')}",
            f"Copy both files from the same `{MADE_BY}` run",
        )
    for name, tensor in weights.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            what = f"{name} is {tensor.dtype}, which is not a type of weights"
            raise DataError(str(path), what, remedy)
    model.load_state_dict(weights, assign=True)
    return model


def read_vqgan_config(folder: str | Path) -> VqganConfig:
    """Read the network's shape from FOLDER/image.json.

    Raises:
        DataError: If the file is missing or unreadable, or does not describe a network.
    """
    path = tokenizer_file(folder, IMAGE_CONFIG_FILE)
    model = read_checked_json(path, FORMAT, MADE_BY).get("model")
    names = {item.name for item in fields(VqganConfig)}
    if not isinstance(model, dict) or {"quantizer", *model} != names:
        found = sorted(model) if isinstance(model, dict) else model
        raise DataError(
            str(path), f"`model` has {found}, not {sorted(names)}", f"Make it with `{MADE_BY}`"
        )
    remedy = f"Make it with `{MADE_BY}`"
    return vqgan_config(Values(model, f"{path}: model", remedy, DataError))


def vqgan_config(values: Values) -> VqganConfig:
    """The network's shape, from what a file states; missing values are the defaults.

    Raises:
        ChameleonError: Of the values' kind: a value cannot be, or two of them do not fit.
    """
    default = VqganConfig()
    factors = values.wholes("ch_mult", low=1, high=64, most=10) or default.ch_mult
    config = VqganConfig(
        resolution=values.whole("resolution", 1, 2**14, default.resolution),
        in_channels=values.whole("in_channels", 1, 64, default.in_channels),
        base_channels=values.whole("base_channels", 1, 2**12, default.base_channels),
        ch_mult=factors,
        num_res_blocks=values.whole("num_res_blocks", 1, 32, default.num_res_blocks),
        z_channels=values.whole("z_channels", 1, 2**14, default.z_channels),
        embed_dim=values.whole("embed_dim", 1, 2**14, default.embed_dim),
        codebook_size=values.whole("codebook_size", 2, 2**24, default.codebook_size),
        dropout=values.number("dropout", 0, 1, default.dropout),
        quantizer=values.text("quantizer", default.quantizer, longest=99),
    )
    try:
        config.check(values.where)
    except ConfigError as error:
        raise values.error(f"{error.where.removeprefix(values.where)[2:]}: {error.what}") from error
    return config


def save_vqgan(model: Vqgan, folder: str | Path, details: Mapping[str, Any] | None = None) -> None:
    """Write FOLDER/image.safetensors, then FOLDER/image.json: if it exists, both are complete.

    Args:
        model: The network.
        folder: The tokenizer folder; created if it is missing.
        details: What else image.json says, apart from the shape of the network: how it was trained.

    Raises:
        DataError: If the file system refuses them; older files in the folder then remain.
    """
    folder = Path(folder)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "model": vqgan_config_to_json(model.config), **(details or {})}
    write_together(
        {
            folder / IMAGE_CONFIG_FILE: (json.dumps(content, indent=2) + "\n").encode(),
            folder / IMAGE_WEIGHTS_FILE: to_safetensors(weights),
        }
    )


def vqgan_config_to_json(config: VqganConfig) -> dict[str, object]:
    """The ``model`` part of image.json.

    The paper's quantizer is not named, so that its files are those of earlier versions.
    """
    values = asdict(config)
    if config.quantizer == "vq":
        del values["quantizer"]
    return values
