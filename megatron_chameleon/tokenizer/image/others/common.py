"""What the networks of other libraries share: their processor's rule, and narrower types."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json_object
from megatron_chameleon.tokenizer.image.network import PixelRule
from megatron_chameleon.values import Values

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
IN_A_MODEL = ("model.vqmodel.", "vqmodel.")
"""Beginnings of the names of a network's tensors among those of a whole model of transformers."""
MOST_LEVELS, MOST_BLOCKS, WIDEST = 12, 64, 2**14
"""Bounds of what a config may ask for, so that a wrong one is refused before it is built."""


class Foreign:
    """Attributes that the networks here have beside those of their library's class."""

    resolution: int
    pixel_rule: PixelRule
    has_decoder = True
    fixed_grid = False
    _dtype = torch.float32

    def for_pictures(self, resolution: int, pixel_rule: PixelRule) -> Self:
        """Take pictures of this size and rule; see ``NetworkKind.build``."""
        self.resolution, self.pixel_rule = resolution, pixel_rule
        return self

    def convolve_in(self, dtype: torch.dtype, memory_format: torch.memory_format) -> Self:
        """Compute in another type, by autocast; the comparison with the codebook stays fp32."""
        self._dtype = dtype
        return self

    def compile_networks(self, backend: str = "inductor") -> Self:
        """Other libraries' code is not made to be compiled as a whole; nothing is done."""
        return self

    def _narrow(self, device: torch.device) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self._dtype)


def processor_rule(folder: Path, default: PixelRule) -> PixelRule:
    """The rule of the image processor that was saved in a folder.

    Args:
        folder: With preprocessor_config.json or processor_config.json.
        default: The rule of the library's class, for what the file does not say, and without one.

    Raises:
        DataError: A value cannot be.
    """
    path = next((folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        return default
    values = Values(
        read_json_object(path, DataError), str(path), "Use the library's own file", DataError
    )
    values = values.section("image_processor", values.content)
    rescale, mean, std = default.rescale, default.mean, default.std
    if "rescale_factor" in values:
        rescale = values.number("rescale_factor", 1e-6, 1e3)
    if not values.flag("do_rescale", True):
        rescale = 1.0
    if "image_mean" in values:
        mean = _three(values, "image_mean", -1e6)
    if "image_std" in values:
        std = _three(values, "image_std", 1e-6)
    if not values.flag("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return PixelRule(rescale, mean, std)


def _three(values: Values, key: str, low: float) -> tuple[float, float, float]:
    """One number of each channel, or one for all."""
    given = values.content[key]
    numbers = given if isinstance(given, list) else [given] * 3
    if len(numbers) != 3:
        raise values.error(f"{key} has {len(numbers)} numbers, not 3")
    red, green, blue = (values.like({key: n}).number(key, low, 1e6) for n in numbers)
    return red, green, blue


def own_config(config: Values, section: str, model_type: str) -> Values:
    """The network's part of a config.json, which may be that of a whole model."""
    return config if config.content.get("model_type") == model_type else config.section(section)


def only(config: Values, key: str, value: Any) -> None:
    """Refuse another value than the one that can be read.

    Raises:
        DataError: It is another one.
    """
    if (found := config.content.get(key, value)) != value:
        raise config.error(f"{key} is {found!r}"[:99] + f", and only {value!r} can be read")


def tuples(model: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a description, for classes that keep what they are given."""
    return {name: list(v) if isinstance(v, list) else v for name, v in model.items()}
