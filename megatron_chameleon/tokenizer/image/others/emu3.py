"""Emu3's image tokenizer: ``Emu3VQVAE`` of transformers.

It is a network of videos. As its own code does, an image is taken for a video in which it is
repeated, as many frames as the network makes one of; and of the decoded frames, the first is taken.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from megatron_chameleon.tokenizer.image.kinds import Described
from megatron_chameleon.tokenizer.image.network import PixelRule
from megatron_chameleon.tokenizer.image.others.common import (
    IN_A_MODEL,
    MOST_LEVELS,
    Foreign,
    processor_rule,
    tuples,
)
from megatron_chameleon.tokenizer.image.others.transformers_networks import (
    CLIP_RULE,
    shared_values,
)
from megatron_chameleon.values import Values

RESOLUTION = 512
"""The least that its processor makes of an image: 512 x 512 pixels."""


class Emu3Network(Foreign, Emu3VQVAE):
    """``Emu3VQVAE`` as an ``ImageNetwork``."""

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return int(self.config.codebook_size)

    @property
    def downsampling(self) -> int:
        """Pixels per code along each axis."""
        return int(self.vision_spatial_factor)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Image codes: int64 [B, N], row-major. T is frames, which become one."""
        frames = self.config.temporal_downsample_factor
        pixels_BTCHW = pixels_BCHW[:, None].repeat(1, frames, 1, 1, 1)
        with self._narrow(pixels_BCHW.device):
            hidden_BTChw = self.encoder(pixels_BTCHW)
            latents_BDThw = self.quant_conv(hidden_BTChw.permute(0, 2, 1, 3, 4))
        latents_BTDhw = latents_BDThw.permute(0, 2, 1, 3, 4).float()
        # one image at a time: the table of distances has half a gigabyte at full size
        return torch.cat([self.quantize(x).flatten(1) for x in latents_BTDhw.split(1)])

    def decode(self, codes_BN: Tensor, rows: int, columns: int) -> Tensor:
        """Pixels of image codes: [B, 3, H, W]."""
        vectors_BThwD = self.quantize.embedding(codes_BN.view(-1, 1, rows, columns))
        vectors_BDThw = vectors_BThwD.permute(0, 4, 1, 2, 3).contiguous()
        with self._narrow(codes_BN.device):
            post_BDThw = self.post_quant_conv(vectors_BDThw)
            frames_MCHW = self.decoder(
                post_BDThw.permute(0, 2, 1, 3, 4), vectors_BDThw.permute(0, 2, 1, 3, 4)
            )
        return frames_MCHW.unflatten(0, (len(codes_BN), -1))[:, 0]


class _Emu3:
    model_types = ("emu3_vqgan", "emu3")

    def describe(self, config: Values, folder: Path) -> Described:
        usual = Emu3VQVAEConfig()
        sizes = ("codebook_size", "embed_dim", "latent_channels", "hidden_size")
        own, model = shared_values(config, "emu3_vqgan", usual, sizes)
        model["num_attention_heads"] = own.whole("num_attention_heads", 1, 4096, 1)
        for name in ("channel_multiplier", "attn_resolutions"):
            given = own.wholes(name, 0, 4096, most=MOST_LEVELS)
            model[name] = given if name in own else list(getattr(usual, name))
        if not model["channel_multiplier"]:
            raise own.error("channel_multiplier is empty")
        frames = own.whole("temporal_downsample_factor", 1, 64, usual.temporal_downsample_factor)
        if frames & (frames - 1):
            raise own.error(f"temporal_downsample_factor is {frames}, not a power of two")
        model["temporal_downsample_factor"] = frames
        return Described(model, RESOLUTION, processor_rule(folder, CLIP_RULE), IN_A_MODEL)

    def build(
        self, model: Mapping[str, Any], resolution: int, pixel_rule: PixelRule
    ) -> Emu3Network:
        network = Emu3Network(Emu3VQVAEConfig(**tuples(model)))
        return network.for_pictures(resolution, pixel_rule)


KIND = _Emu3()
