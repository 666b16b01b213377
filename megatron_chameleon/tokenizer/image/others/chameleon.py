"""The encoder of images of transformers' Chameleon, ``ChameleonVQVAE``.

It is our VQGAN without a decoder, with the same names of tensors, so that it becomes one, and
images are scaled as they are for ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.tokenizer.image.facts import (
    transformers_vqgan,
    vqgan_config,
    vqgan_config_to_json,
)
from megatron_chameleon.tokenizer.image.kinds import Described
from megatron_chameleon.tokenizer.image.network import FROM_MINUS_ONE_TO_ONE, PixelRule
from megatron_chameleon.tokenizer.image.others.common import IN_A_MODEL, only, own_config
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.values import Values


class _Chameleon:
    model_types = ("chameleon_vqgan", "chameleon")

    def describe(self, config: Values, folder: Path) -> Described:
        own = own_config(config, "vq_config", "chameleon_vqgan")
        only(own, "double_latent", False)
        if own.content.get("attn_resolutions"):
            raise own.error("attn_resolutions is set, and only attention in the middle can be read")
        shape = transformers_vqgan(own)
        model = dict(vqgan_config_to_json(shape))
        return Described(model, shape.resolution, FROM_MINUS_ONE_TO_ONE, IN_A_MODEL)

    def build(self, model: Mapping[str, Any], resolution: int, pixel_rule: PixelRule) -> Vqgan:
        config = vqgan_config(Values(model, "model", "Use the config.json of the weights"))
        return Vqgan(replace(config, resolution=resolution), has_decoder=False)


KIND = _Chameleon()
