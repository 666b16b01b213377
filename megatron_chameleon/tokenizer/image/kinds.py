"""The kinds of networks that image tokenizers can have besides ours, and how they are found.

A kind is found by the name in image.json, or by the ``model_type`` in the config.json of another
library. Other packages add theirs by an entry point of the group ``GROUP``: its name is the
network's, its value an object like ``NetworkKind``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from megatron_chameleon.errors import ChameleonError, DataError, first_line
from megatron_chameleon.tokenizer.image.network import ImageNetwork, PixelRule
from megatron_chameleon.values import Values, printable

GROUP = "megatron_chameleon.image_networks"
_ROOM = "megatron_chameleon.tokenizer.image.others"
_INCLUDED = {
    "chameleon": f"{_ROOM}.chameleon:KIND",
    "emu3": f"{_ROOM}.emu3:KIND",
    "janus": f"{_ROOM}.janus:KIND",
    "vqmodel": f"{_ROOM}.vqmodel:KIND",
}
_MODEL_TYPES = {
    "chameleon": "chameleon",
    "chameleon_vqgan": "chameleon",
    "emu3": "emu3",
    "emu3_vqgan": "emu3",
    "janus": "janus",
    "janus_vqgan": "janus",
    "VQModel": "vqmodel",
}
"""What config.json says of the kinds that come with this package, which are not loaded to ask."""


@dataclass(frozen=True)
class Described:
    """What a kind reads from the config of another library.

    Attributes:
        model: What it builds the network from; it is kept in image.json, so that it must be JSON.
        resolution: Width and height of the square that the network is made for.
        pixel_rule: The rule of the library's own image processor.
        prefixes: Beginnings of the names of the network's tensors, where the folder may have more
            than the network. The first that occurs is cut off, and tensors without it are left out.
    """

    model: dict[str, Any]
    resolution: int
    pixel_rule: PixelRule
    prefixes: Sequence[str] = ()


class NetworkKind(Protocol):
    """A kind of network: how it is read from a folder of its library, and built again.

    Attributes:
        model_types: The values of ``model_type``, or of ``_class_name``, in the config.json of
            folders that ``describe`` reads.
    """

    @property
    def model_types(self) -> Sequence[str]: ...

    def describe(self, config: Values, folder: Path) -> Described:
        """Read a config.json.

        Args:
            config: Its content; its methods raise errors that say what is wrong.
            folder: Where it is; there may be more files, such as preprocessor_config.json.
        """
        ...

    def build(
        self, model: Mapping[str, Any], resolution: int, pixel_rule: PixelRule
    ) -> ImageNetwork:
        """The network, a ``torch.nn.Module``. Its weights follow by ``load_state_dict``.

        Args:
            model: As ``describe`` returned it.
            resolution: The chosen square, whose codes images have.
            pixel_rule: The rule that the network must state.
        """
        ...


def kind_named(name: str, where: str) -> NetworkKind:
    """The kind of a network that image.json names.

    Raises:
        DataError: No installed package has it, or it cannot be loaded.
    """
    if name in _INCLUDED:
        return _load(EntryPoint(name, _INCLUDED[name], GROUP), where)
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        raise DataError(
            where,
            f"its network is {printable(name)!r}, which no installed package has; the known ones "
            f"are {', '.join(sorted(_names()))}",
            f"Install the package that adds it (entry points {GROUP})",
        )
    return _load(found[0], where)


def kind_of_config(config: Values) -> tuple[str, NetworkKind]:
    """The kind that reads a config.json of another library, and its name.

    Raises:
        DataError: None does, or it cannot be loaded.
    """
    key = "model_type" if "model_type" in config else "_class_name"
    said = config.text(key, "")
    if said in _MODEL_TYPES:
        name = _MODEL_TYPES[said]
        return name, kind_named(name, config.where)
    known = set(_MODEL_TYPES)
    for point in entry_points(group=GROUP):
        kind = _load(point, config.where)
        if said and said in kind.model_types:
            return point.name, kind
        known |= set(kind.model_types)
    what = f"{key} is {printable(said)!r}" if said else "it says neither model_type nor _class_name"
    raise DataError(
        config.where,
        f"{what}, and the image tokenizers that can be read are {', '.join(sorted(known))}",
        "Give a folder of one of them, with config.json and safetensors as save_pretrained writes "
        "them",
    )


def _names() -> Iterator[str]:
    yield from _INCLUDED
    yield from (point.name for point in entry_points(group=GROUP))


def _load(point: EntryPoint, where: str) -> NetworkKind:
    """The kind of an entry point.

    Raises:
        DataError: Its module cannot be imported, or has no such object.
    """
    try:
        loaded: NetworkKind = point.load()
        return loaded
    except ChameleonError:
        raise
    except Exception as error:  # a module of another package may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        package = str(missing or "").partition(".")[0]
        remedy = f"Install {package}" if package else "Repair or remove that package"
        if package == "diffusers":
            remedy = "Run pip install 'megatron-chameleon[diffusers]'"
        what = f"the network {printable(point.name)!r} ({point.value}) cannot be loaded: "
        what += f"{type(error).__name__}: {first_line(error)[:200]}"
        raise DataError(where, what, remedy) from error
