"""Makes an image tokenizer of a network that another library trained.

    chameleon tokenizer image --from Emu3-VisionTokenizer --output tokenizer

The folder of the other library has config.json and safetensors, as its ``save_pretrained`` writes
them. Its weights are copied, so that the tokenizer folder can be moved and its fingerprint covers
every byte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import read_json_object, why_no_folder
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.image.facts import (
    LARGEST_RESOLUTION,
    VQGAN,
    NetworkFacts,
    tensor_names,
)
from megatron_chameleon.tokenizer.image.kinds import Described, NetworkKind, kind_of_config
from megatron_chameleon.tokenizer.image.network import ImageNetwork
from megatron_chameleon.tokenizer.image.stored import (
    build_network,
    check_tensors,
    facts_of,
    save_network,
    save_vqgan,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.values import Values, printable

CONFIG_FILE = "config.json"
LARGEST_JSON_BYTES = 64 << 20
_WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_COPY = "Copy it again"
_REMEDY = "Give a folder with config.json and safetensors, as save_pretrained writes them"


@dataclass(frozen=True)
class ImportedNetwork:
    """What an import made."""

    network: str
    """The name of its kind."""
    facts: NetworkFacts
    parameters: int


def import_network(
    folder: str | Path, output: str | Path, resolution: int | None = None
) -> ImportedNetwork:
    """Write OUTPUT/image.json and image.safetensors of a network of another library.

    Args:
        folder: Its folder: the network's own, or that of a whole model that has one.
        output: The tokenizer folder; an older image tokenizer in it is replaced.
        resolution: Width and height of an image in pixels; None: what the network is made for.

    Returns:
        What was made.

    Raises:
        DataError: The folder has no network that can be read, or its files do not belong together.
        ConfigError: The resolution does not fit the network, or its codes the vocabulary in OUTPUT.
    """
    folder, output = Path(folder), Path(output)
    if not folder.is_dir():
        raise DataError(str(folder), why_no_folder(folder), _REMEDY)
    path = folder / CONFIG_FILE
    if not path.is_file() and _pickles(folder):
        raise _only_pickled(folder)
    try:
        content = read_json_object(path, DataError, LARGEST_JSON_BYTES)
    except DataError as error:
        raise DataError(error.where, error.what, _REMEDY) from error
    config = Values(
        content, str(path), "Give the config.json that belongs to the weights", DataError
    )
    name, kind = kind_of_config(config)
    described = kind.describe(config, folder)
    network = _network(kind, described, resolution, str(path))
    _check_resolution(network, resolution, described.resolution)
    _check_vocabulary(output, network.codebook_size)
    weights = read_weights(folder, described.prefixes)
    check_tensors(network, weights, str(folder), CONFIG_FILE, "Copy the whole folder again")
    network.load_state_dict(weights, assign=True)
    _try(network.float().eval(), folder)
    parameters = sum(weight.numel() for weight in weights.values())
    if isinstance(network, Vqgan):
        save_vqgan(network, output)
        name = VQGAN
    else:
        save_network(name, described.model, network, weights, output)
    return ImportedNetwork(name, facts_of(network), parameters)


def _network(
    kind: NetworkKind, described: Described, resolution: int | None, where: str
) -> ImageNetwork:
    chosen = described.resolution if resolution is None else resolution
    return build_network(kind, described.model, chosen, described.pixel_rule, where)


def _check_resolution(network: ImageNetwork, chosen: int | None, usual: int) -> None:
    """Refuse a square that is not a whole number of codes, or that the network cannot take."""
    resolution, step = network.resolution, network.downsampling
    if not 1 <= resolution <= LARGEST_RESOLUTION:
        what, remedy = f"{resolution} is not from 1 to {LARGEST_RESOLUTION}", f"Use {usual}"
        raise ConfigError("--resolution", what, remedy)
    if resolution % step:
        nearest = max(1, round(resolution / step)) * step
        what = f"{resolution} is not a multiple of {step}, the network's pixels per code"
        raise ConfigError("--resolution", what, f"Use {nearest}")
    if network.fixed_grid and chosen not in (None, usual):
        what = f"{chosen} was chosen, but the network only takes pictures of {usual} x {usual}"
        raise ConfigError("--resolution", what, "Leave it out")


def _check_vocabulary(output: Path, codebook_size: int) -> None:
    if not (output / VOCABULARY_FILE).exists():
        return
    vocabulary = Vocabulary.load(output)
    if vocabulary.image_codes != codebook_size:
        what = f"{VOCABULARY_FILE} has {vocabulary.image_codes} image codes, but the network has "
        what += f"{codebook_size}"
        remedy = f"Run `chameleon tokenizer text` with --image-codes {codebook_size} first, or "
        raise ConfigError(str(output), what, remedy + "choose another --output")


def _try(network: ImageNetwork, folder: Path) -> None:
    """Encode and decode a small picture, so that a network that cannot do so is found here.

    Raises:
        DataError: It failed, or its codes are not what the protocol says.
    """
    grid = network.resolution // network.downsampling if network.fixed_grid else 2
    side = grid * network.downsampling
    try:
        with torch.inference_mode():
            grey = torch.full((1, 3, side, side), 127, dtype=torch.uint8)
            codes = network.encode(network.pixel_rule.to_floats(grey))
            problem = ""
            if codes.dtype != torch.int64 or tuple(codes.shape) != (1, grid * grid):
                problem = (
                    f"gives {codes.dtype} {list(codes.shape)} for a picture of {grid} x {grid}"
                )
            elif not 0 <= int(codes.min()) <= int(codes.max()) < network.codebook_size:
                problem = f"gives codes outside [0, {network.codebook_size})"
            elif network.has_decoder:
                shape = tuple(network.decode(codes, grid, grid).shape)
                if shape != (1, 3, side, side):
                    problem = f"gives pixels of the shape {list(shape)}, not {[1, 3, side, side]}"
    except Exception as error:  # the network is another library's
        problem = f"fails with {type(error).__name__}: {first_line(error)[:200]}"
    if problem:
        what = f"the network of {CONFIG_FILE} {problem}"
        raise DataError(str(folder), what, "Copy the whole folder again, or choose another network")


# The weights


def read_weights(folder: Path, prefixes: Any = ()) -> dict[str, torch.Tensor]:
    """The tensors of the network, by its own names.

    Args:
        folder: With one safetensors file, or with several and their index.
        prefixes: See ``Described``.

    Raises:
        DataError: There is none, one is missing or damaged, or there are pickles alone.
    """
    found: dict[str, torch.Tensor] = {}
    files = _weight_files(folder)
    names = {name: file for file in files for name in tensor_names(file, _COPY)}
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in names)), "")
    wanted = {name for name in names if name.startswith(prefix)}
    for file in files:
        if not any(names[name] == file for name in wanted):
            continue
        try:
            tensors = load_file(file) if not prefix else _load_some(file, prefix)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(file, error) from error
        found |= {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return found


def _load_some(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: opened.get_tensor(name) for name in names}


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(str(file), f"cannot be read ({first_line(error)[:200]})", _COPY)


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if not others and _pickles(folder):
        raise _only_pickled(folder)
    if len(others) == 1:
        return [folder / others[0]]
    what = "has no model.safetensors"
    if others:
        what += f", and no model.safetensors.index.json says which of its {len(others)} "
        what += "safetensors files belong together"
    raise DataError(str(folder), what, _REMEDY)


def _shards(index: Path) -> list[Path]:
    content = Values(
        read_json_object(index, DataError, LARGEST_JSON_BYTES), str(index), _REMEDY, DataError
    )
    names = content.section("weight_map").content.values()
    shards = sorted({str(name) for name in names})
    for name in shards:
        if Path(name).name != name:
            raise content.error(f"weight_map names {printable(name)!r}, which is in another folder")
        if not (index.parent / name).is_file():
            raise DataError(str(index.parent / name), "is missing", "Copy the whole folder again")
    if not shards:
        raise content.error("weight_map is empty")
    return [index.parent / name for name in shards]


def _pickles(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)


def _only_pickled(folder: Path) -> DataError:
    name = _pickles(folder)[0]
    return DataError(
        str(folder),
        f"has its weights only in {printable(name)}, a pickle, which can run any program when it "
        "is opened",
        "If you trust it, load it with its own library, and write it with "
        "save_pretrained(FOLDER), which makes safetensors",
    )


def describe_import(made: ImportedNetwork) -> str:
    """The line about an import, for people."""
    facts = made.facts
    grid = facts.resolution // facts.downsampling
    line = (
        f"{made.network}, {made.parameters:,} parameters, {facts.codebook_size:,} codes, images of "
    )
    line += f"{facts.resolution} x {facts.resolution} pixels as {grid} x {grid} codes"
    return line if facts.has_decoder else line + ", without a decoder: images are read, not drawn"
