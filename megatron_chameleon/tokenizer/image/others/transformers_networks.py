"""What the networks of transformers share: the names in a whole model, the rule, and the sizes."""

from collections.abc import Sequence
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from megatron_chameleon.tokenizer.image.network import PixelRule
from megatron_chameleon.tokenizer.image.others.common import (
    MOST_BLOCKS,
    WIDEST,
    only,
    own_config,
)
from megatron_chameleon.values import Values

CLIP_RULE = PixelRule(1 / 255, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
"""Of ``Emu3ImageProcessor`` and ``JanusImageProcessor``, where no file says another."""


def shared_values(
    config: Values, model_type: str, usual: Any, sizes: Sequence[str]
) -> tuple[Values, dict[str, Any]]:
    """The network's part of a config.json, and those of its values that all networks here have.

    Args:
        config: The whole file.
        model_type: That of the network alone.
        usual: The config of the library's class with its defaults.
        sizes: Names of values that are only bounded by what can be a size.

    Raises:
        DataError: A value cannot be, or cannot be read.
    """
    own = own_config(config, "vq_config", model_type)
    for key, value in {"in_channels": 3, "out_channels": 3, "double_latent": False}.items():
        only(own, key, value)
    bounds = {**dict.fromkeys(sizes, 2**24), "base_channels": WIDEST, "num_res_blocks": MOST_BLOCKS}
    return own, {n: own.whole(n, 1, most, getattr(usual, n)) for n, most in bounds.items()}
