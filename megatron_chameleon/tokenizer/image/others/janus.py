"""Janus's image tokenizer: ``JanusVQVAE`` of transformers, LlamaGen's network.

Its codebook vectors are normalised before they are decoded, as in its own code. That code decodes
one square alone; the network itself takes any shape.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import JanusVQVAE, JanusVQVAEConfig

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


class JanusNetwork(Foreign, JanusVQVAE):
    """``JanusVQVAE`` as an ``ImageNetwork``."""

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return int(self.config.num_embeddings)

    @property
    def downsampling(self) -> int:
        """Pixels per code along each axis."""
        return int(2 ** (len(self.config.channel_multiplier) - 1))

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Image codes: int64 [B, N], row-major."""
        with self._narrow(pixels_BCHW.device):
            latents_BDhw = self.quant_conv(self.encoder(pixels_BCHW))
        # one image at a time: the table of distances is large
        return torch.stack([self.quantize(x)[2] for x in latents_BDhw.float().split(1)])

    def decode(self, codes_BN: Tensor, rows: int, columns: int) -> Tensor:
        """Pixels of image codes: [B, 3, H, W]."""
        vectors_BND = functional.normalize(self.quantize.embedding(codes_BN), p=2, dim=-1)
        vectors_BDhw = vectors_BND.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous()
        with self._narrow(codes_BN.device):
            return self.decoder(self.post_quant_conv(vectors_BDhw))


class _Janus:
    model_types = ("janus_vqgan", "janus")

    def describe(self, config: Values, folder: Path) -> Described:
        usual = JanusVQVAEConfig()
        sizes = ("num_embeddings", "embed_dim", "latent_channels")
        own, model = shared_values(config, "janus_vqgan", usual, sizes)
        model["num_patches"] = own.whole("num_patches", 1, 4096, usual.num_patches)
        factors = own.wholes("channel_multiplier", 1, 4096, most=MOST_LEVELS)
        model["channel_multiplier"] = factors or list(usual.channel_multiplier)
        resolution = model["num_patches"] * 2 ** (len(model["channel_multiplier"]) - 1)
        return Described(model, resolution, processor_rule(folder, CLIP_RULE), IN_A_MODEL)

    def build(
        self, model: Mapping[str, Any], resolution: int, pixel_rule: PixelRule
    ) -> JanusNetwork:
        network = JanusNetwork(JanusVQVAEConfig(**tuples(model)))
        return network.for_pictures(resolution, pixel_rule)


KIND = _Janus()
