"""The files of an image tokenizer: image.json with its shape, and image.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from megatron_chameleon.errors import ChameleonError, DataError, first_line
from megatron_chameleon.files import open_to_read, write_together
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.image.facts import (
    FORMAT,
    MADE_BY,
    VQGAN,
    NetworkFacts,
    StoredNetwork,
    network_name,
    read_stored,
    read_vqgan_config,
    vqgan_config_to_json,
)
from megatron_chameleon.tokenizer.image.kinds import NetworkKind, kind_named
from megatron_chameleon.tokenizer.image.network import ImageNetwork, PixelRule
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.values import Values, describe, printable

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REMEDY = f"Make it with `{MADE_BY}`"


def load_network(folder: str | Path) -> ImageNetwork:
    """Read the network of FOLDER/image.json and FOLDER/image.safetensors.

    Raises:
        DataError: If one of them is missing or unreadable, they do not belong together, or no
            installed package has the network.
    """
    path = tokenizer_file(folder, IMAGE_WEIGHTS_FILE)
    remedy = f"Copy both files from the same `{MADE_BY}` run"
    if network_name(folder) == VQGAN:
        config = read_vqgan_config(folder)
        weights = _load_weights(path)
        has_decoder = any(name.startswith("decoder.") for name in weights)
        with torch.device("meta"):
            model: ImageNetwork = Vqgan(config, has_decoder=has_decoder)
        check_tensors(model, weights, str(path), IMAGE_CONFIG_FILE, remedy)
        model.load_state_dict(weights, assign=True)
        return model
    stored = read_stored(folder)
    rule = _rule_of_json(stored.pixels)
    kind = kind_named(stored.network, stored.where)
    network = build_network(kind, stored.model, stored.facts.resolution, rule, stored.where)
    _check_facts(facts_of(network), stored)
    weights = _load_weights(path)
    check_tensors(network, weights, str(path), IMAGE_CONFIG_FILE, remedy)
    network.load_state_dict(weights, assign=True)
    return network.float()


def build_network(
    kind: NetworkKind, model: Mapping[str, Any], resolution: int, rule: PixelRule, where: str
) -> ImageNetwork:
    """A network without weights, as its kind builds it.

    Raises:
        DataError: The kind refuses the description. Kinds of other packages may raise anything.
    """
    try:
        with torch.device("meta"):
            return kind.build(model, resolution, rule)
    except ChameleonError:
        raise
    except Exception as error:
        what = f"describes no network that can be built: {type(error).__name__}: "
        what += first_line(error)[:200]
        raise DataError(where, what, "Use the file that belongs to the weights") from error


def facts_of(network: ImageNetwork) -> NetworkFacts:
    """What image.json states of a network."""
    return NetworkFacts(
        network.resolution,
        network.downsampling,
        network.codebook_size,
        network.has_decoder,
        network.fixed_grid,
    )


def _check_facts(found: NetworkFacts, stored: StoredNetwork) -> None:
    """Refuse an image.json whose facts are not those of its network.

    Raises:
        DataError: It names the first that differs.
    """
    for name, value in asdict(stored.facts).items():
        if getattr(found, name) != value:
            what = f"facts: {name} is {value}, and the network {stored.network!r} of its `model` "
            what += f"has {getattr(found, name)}"
            raise DataError(stored.where, what, "Copy the file again")


def _load_weights(path: Path) -> dict[str, Tensor]:
    remedy = f"Make it with `{MADE_BY}`"
    try:
        open_to_read(path).close()
        return load_file(path)
    except DataError as error:
        raise DataError(error.where, error.what, remedy) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(str(path), f"cannot be read ({first_line(error)[:200]})", remedy) from error


def check_tensors(
    network: ImageNetwork, weights: Mapping[str, Tensor], where: str, config: str, remedy: str
) -> None:
    """Refuse weights that are not those of a network.

    Args:
        network: The network; it needs no weights yet.
        weights: The tensors by name.
        where: The file or folder that they are from.
        config: The file that describes the network.
        remedy: What to do.

    Raises:
        DataError: A tensor is missing, unexpected, or of another shape or type.
    """
    own = network.state_dict()  # walks through all modules: once, not for each tensor
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        name = wrong[0]
        raise DataError(
            where,
            f"{len(wrong)} tensors do not fit {config}: "
            f"{printable(name)} is {found.get(name, 'missing')}, "
            f"the config needs {expected.get(name, 'none')}",
            remedy,
        )
    for name, tensor in weights.items():
        if tensor.dtype not in _WEIGHT_DTYPES and tensor.dtype != own[name].dtype:
            what = f"{name} is {tensor.dtype}, which is not a type of weights"
            raise DataError(where, what, f"Make it with `{MADE_BY}`")


def save_network(
    name: str,
    model: Mapping[str, Any],
    network: ImageNetwork,
    weights: Mapping[str, Tensor],
    folder: str | Path,
) -> None:
    """Write FOLDER/image.safetensors and image.json of another network than ours.

    Args:
        name: The name of its kind.
        model: What the kind builds it from.
        network: The network, for its facts.
        weights: Its weights, which are written as they are.
        folder: The tokenizer folder; created if it is missing.

    Raises:
        DataError: If the file system refuses them; older files in the folder then remain.
    """
    rule = asdict(network.pixel_rule)
    facts = asdict(facts_of(network))
    content = {"format": FORMAT, "network": name, "facts": facts, "pixels": rule, "model": model}
    tensors = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
    _write(Path(folder), content, tensors)


def _rule_of_json(values: Values) -> PixelRule:
    return PixelRule(
        values.number("rescale", 1e-6, 1e3), _three(values, "mean", -1e6), _three(values, "std")
    )


def _three(values: Values, key: str, low: float = 1e-6) -> tuple[float, float, float]:
    given = values.content.get(key)
    if not isinstance(given, list) or len(given) != 3:
        raise values.error(f"{key} is {describe(given)}, not three numbers")
    red, green, blue = (values.like({key: number}).number(key, low, 1e6) for number in given)
    return red, green, blue


def save_vqgan(model: Vqgan, folder: str | Path, details: Mapping[str, Any] | None = None) -> None:
    """Write FOLDER/image.safetensors, then FOLDER/image.json: if it exists, both are complete.

    Args:
        model: The network.
        folder: The tokenizer folder; created if it is missing.
        details: What else image.json says, apart from the shape of the network: how it was trained.

    Raises:
        DataError: If the file system refuses them; older files in the folder then remain.
    """
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "model": vqgan_config_to_json(model.config), **(details or {})}
    _write(Path(folder), content, weights)


def _write(folder: Path, content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    write_together(
        {
            folder / IMAGE_CONFIG_FILE: (json.dumps(content, indent=2) + "\n").encode(),
            folder / IMAGE_WEIGHTS_FILE: to_safetensors(dict(weights)),
        }
    )
