"""What image.json says of an image tokenizer's network, read without torch.

The file names the network (``"network"``; without it, it is our VQGAN), and has what that network
needs to be built (``"model"``). Of other networks than ours it states the facts too (``"facts"``),
so that programs need not build one to know its grid.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import open_to_read
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
    read_checked_json,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.image.shape import VqganConfig
from megatron_chameleon.values import Values

FORMAT = "megatron_chameleon.image_tokenizer/1"
MADE_BY = "chameleon tokenizer image"
VQGAN = "vqgan"
"""The name of our network, which image.json does not state."""
LARGEST_RESOLUTION, MOST_CODES = 2**14, 2**24

TRANSFORMERS_NAMES = {
    "embed_dim": "embed_dim",
    "num_embeddings": "codebook_size",
    "latent_channels": "z_channels",
    "resolution": "resolution",
    "in_channels": "in_channels",
    "base_channels": "base_channels",
    "channel_multiplier": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "dropout": "dropout",
}
"""Names of the VQGAN's sizes in transformers' config of a Chameleon, and ours."""


@dataclass(frozen=True)
class NetworkFacts:
    """What others need to know of a network."""

    resolution: int
    """Width and height in pixels of the square that it is made for."""
    downsampling: int
    """Pixels per code along each axis."""
    codebook_size: int
    """Number of image codes."""
    has_decoder: bool
    """Whether it can turn codes into pixels."""
    fixed_grid: bool = False
    """Whether it can take nothing else than its square."""

    @property
    def codes_per_image(self) -> int:
        """Codes of the square."""
        return (self.resolution // self.downsampling) ** 2


@dataclass(frozen=True)
class StoredNetwork:
    """The content of image.json, of any network but ours.

    Attributes:
        where: The file.
        network: The name of the network's kind.
        model: What the kind builds the network from.
        facts: What the network must be like.
        pixels: The section of the rule of the pixels.
    """

    where: str
    network: str
    model: dict[str, Any]
    facts: NetworkFacts
    pixels: Values


def network_name(folder: str | Path) -> str:
    """The name of the network of FOLDER/image.json.

    Raises:
        DataError: The file is missing or unreadable.
    """
    return _content(folder).text("network", VQGAN)


def described_network(folder: str | Path) -> str:
    """``network_name``, and of our VQGAN its quantizer, if that is not Chameleon's.

    Raises:
        DataError: The file is missing or unreadable, or does not describe a network.
    """
    name = network_name(folder)
    quantizer = read_vqgan_config(folder).quantizer if name == VQGAN else ""
    return f"{name} ({quantizer})" if quantizer not in ("", "vq") else name


def read_facts(folder: str | Path) -> NetworkFacts:
    """The facts of the network of a tokenizer folder.

    Raises:
        DataError: A file is missing or unreadable, or does not describe a network.
    """
    if network_name(folder) != VQGAN:
        return read_stored(folder).facts
    config = read_vqgan_config(folder)
    return NetworkFacts(
        config.resolution, config.downsampling, config.codebook_size, _has_decoder(folder)
    )


def _has_decoder(folder: str | Path) -> bool:
    path = tokenizer_file(folder, IMAGE_WEIGHTS_FILE)
    return any(name.startswith("decoder.") for name in tensor_names(path, "Copy the folder again"))


def tensor_names(path: Path, remedy: str) -> list[str]:
    """The names in a safetensors file, of which only the head is read.

    Args:
        path: The file.
        remedy: What to do if it cannot be read.

    Raises:
        DataError: It is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_to_read(path).close()
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        what = f"cannot be read ({first_line(error)[:200]})"
        raise DataError(str(path), what, remedy) from error


def codes_and_grid(folder: str | Path) -> tuple[int, int]:
    """The size of the codebook, and the codes of the square; image.json is enough to know them.

    Raises:
        DataError: The file is missing or unreadable, or does not describe a network.
    """
    if network_name(folder) == VQGAN:
        config = read_vqgan_config(folder)
        return config.codebook_size, config.codes_per_image
    facts = read_stored(folder).facts
    return facts.codebook_size, facts.codes_per_image


def read_stored(folder: str | Path) -> StoredNetwork:
    """Read FOLDER/image.json of another network than ours.

    Raises:
        DataError: The file is missing or unreadable, or does not describe a network.
    """
    content = _content(folder)
    facts = content.section("facts")
    found = NetworkFacts(
        resolution=facts.whole("resolution", 1, LARGEST_RESOLUTION),
        downsampling=facts.whole("downsampling", 1, LARGEST_RESOLUTION),
        codebook_size=facts.whole("codebook_size", 2, MOST_CODES),
        has_decoder=facts.flag("has_decoder"),
        fixed_grid=facts.flag("fixed_grid", False),
    )
    if found.resolution % found.downsampling:
        what = f"resolution {found.resolution} is not a multiple of {found.downsampling}"
        raise facts.error(f"{what}, the pixels per code")
    model = dict(content.section("model").content)
    return StoredNetwork(
        content.where, content.text("network"), model, found, content.section("pixels")
    )


def _content(folder: str | Path) -> Values:
    path = tokenizer_file(folder, IMAGE_CONFIG_FILE)
    content = read_checked_json(path, FORMAT, MADE_BY)
    return Values(content, str(path), f"Make it with `{MADE_BY}`", DataError)


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


def transformers_vqgan(values: Values) -> VqganConfig:
    """The network's shape, from the ``vq_config`` of transformers' Chameleon.

    Raises:
        ChameleonError: Of the values' kind: a value cannot be, or two of them do not fit.
    """
    found = values.content
    content = {ours: found[hf] for hf, ours in TRANSFORMERS_NAMES.items() if hf in found}
    return vqgan_config(values.like(content))


def vqgan_config_to_json(config: VqganConfig) -> dict[str, object]:
    """The ``model`` part of image.json.

    The paper's quantizer is not named, so that its files are those of earlier versions.
    """
    values = asdict(config)
    if config.quantizer == "vq":
        del values["quantizer"]
    return values
