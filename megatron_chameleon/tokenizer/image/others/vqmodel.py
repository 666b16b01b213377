"""diffusers' ``VQModel``: VQGANs as of latent diffusion, and MoVQGAN (``norm_type`` spatial)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from megatron_chameleon.tokenizer.image.kinds import Described
from megatron_chameleon.tokenizer.image.network import PixelRule
from megatron_chameleon.tokenizer.image.others.common import (
    MOST_BLOCKS,
    MOST_LEVELS,
    WIDEST,
    Foreign,
    only,
    tuples,
)
from megatron_chameleon.values import Values

RULE = PixelRule(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Of ``VaeImageProcessor``: from -1 to 1."""


class VqmodelNetwork(Foreign, VQModel):
    """``VQModel`` as an ``ImageNetwork``."""

    config: Any
    encoder: Any
    decoder: Any
    quantize: Any
    quant_conv: Any
    post_quant_conv: Any

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return int(self.config.num_vq_embeddings)

    @property
    def downsampling(self) -> int:
        """Pixels per code along each axis."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Image codes: int64 [B, N], row-major."""
        with self._narrow(pixels_BCHW.device):
            latents_BDhw = self.quant_conv(self.encoder(pixels_BCHW))
        # one image at a time: the table of distances is large
        return torch.stack(
            [self.quantize(x)[2][2].flatten() for x in latents_BDhw.float().split(1)]
        )

    def decode(self, codes_BN: Tensor, rows: int, columns: int) -> Tensor:
        """Pixels of image codes: [B, 3, H, W]."""
        width = self.quantize.vq_embed_dim
        shape = (len(codes_BN), rows, columns, width)
        vectors_BDhw = self.quantize.get_codebook_entry(codes_BN, shape)
        spatial = vectors_BDhw if self.config.norm_type == "spatial" else None
        with self._narrow(codes_BN.device):
            return self.decoder(self.post_quant_conv(vectors_BDhw), spatial)


class _Vqmodel:
    model_types = ("VQModel",)

    def describe(self, config: Values, folder: Path) -> Described:
        only(config, "in_channels", 3)
        only(config, "out_channels", 3)
        widths = config.wholes("block_out_channels", 1, WIDEST, most=MOST_LEVELS) or [64]
        model: dict[str, Any] = {
            "block_out_channels": widths,
            "layers_per_block": config.whole("layers_per_block", 1, MOST_BLOCKS, 1),
            "latent_channels": config.whole("latent_channels", 1, WIDEST, 3),
            "num_vq_embeddings": config.whole("num_vq_embeddings", 2, 2**24, 256),
            "norm_num_groups": config.whole("norm_num_groups", 1, WIDEST, 32),
            "vq_embed_dim": config.whole("vq_embed_dim", 1, WIDEST, None),
            "act_fn": config.text("act_fn", "silu", longest=32),
            "norm_type": config.text("norm_type", "group", longest=32),
            "mid_block_add_attention": config.flag("mid_block_add_attention", True),
        }
        for key, usual in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            names = config.content.get(f"{key}_block_types", [usual])
            if not isinstance(names, list) or len(names) != len(widths):
                what = f"{key}_block_types has not the {len(widths)} levels of block_out_channels"
                raise config.error(what)
            model[f"{key}_block_types"] = [str(name)[:64] for name in names]
        return Described(model, config.whole("sample_size", 1, 2**14, 32), RULE)

    def build(
        self, model: Mapping[str, Any], resolution: int, pixel_rule: PixelRule
    ) -> VqmodelNetwork:
        network = VqmodelNetwork(**tuples(model))
        return network.for_pictures(resolution, pixel_rule)


KIND = _Vqmodel()
