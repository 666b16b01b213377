"""Lookup-free quantization: the signs of a latent's dimensions are the bits of its code.

Source: Yu et al. 2024 (MAGVIT-v2), section 3.1. There is no table to search and none to learn.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.tokenizer.image.quantizers.entropy import entropy_of
from megatron_chameleon.tokenizer.image.quantizers.quantized import Quantized, rows_of

GROUP_BITS = 10
"""The entropy of a batch's codes is exact up to so many bits. Codes of more bits are cut into
groups, whose entropies are added up: that is what it would be if the groups were independent."""


class LookupFree(nn.Module):
    """Each code stands for a corner of the cube {-1, 1}^D; the first dimension is its highest bit.

    Args:
        embed_dim: Number of bits, D.
        temperature: Of the softmax over squared distances whose entropy is measured.
    """

    def __init__(self, embed_dim: int, temperature: float) -> None:
        super().__init__()
        self.bits = embed_dim
        self.temperature = temperature

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=device)

    @torch.no_grad()
    def nearest(self, latents_BDhw: Tensor) -> Tensor:
        """Codes of the signs, 0 counting as negative: int64 [B, N], row-major."""
        bits_BND = (latents_BDhw.flatten(2).transpose(1, 2) > 0).long()
        return (bits_BND << self._places(latents_BDhw.device)).sum(dim=2)

    def lookup(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Corners of row-major codes: float32 [B, D, h, w] of -1 and 1."""
        bits_BND = codes_BN[..., None] >> self._places(codes_BN.device) & 1
        return (2 * bits_BND - 1).float().transpose(1, 2).unflatten(2, grid)

    def quantize(self, latents_BDhw: Tensor) -> Quantized:
        """One training pass; the gradient goes straight through to the latents."""
        codes_BN = self.nearest(latents_BDhw)
        corners_BDhw = self.lookup(codes_BN, (latents_BDhw.shape[2], latents_BDhw.shape[3]))
        return Quantized(
            codes_BN=codes_BN,
            straight_BDhw=latents_BDhw + (corners_BDhw - latents_BDhw).detach(),
            codebook_loss=latents_BDhw.new_zeros(()),
            commitment_loss=functional.mse_loss(latents_BDhw, corners_BDhw),
            entropy_loss=self.entropy_loss(rows_of(latents_BDhw).float()),
        )

    def entropy_loss(self, rows_MD: Tensor) -> Tensor:
        """Mean entropy of the codes of single latents, less the entropy of their mean.

        A softmax over the squared distances from all corners is a product over the dimensions, so
        the first term is exact for any number of bits.
        """
        # -(z - 1)^2 + (z + 1)^2 = 4 z
        logits_MD = 4 * rows_MD / self.temperature
        highs_MD, lows_MD = logits_MD.sigmoid(), (-logits_MD).sigmoid()
        each_MD = -highs_MD * functional.logsigmoid(logits_MD)
        each_MD = each_MD - lows_MD * functional.logsigmoid(-logits_MD)
        together = rows_MD.new_zeros(())
        for start in range(0, self.bits, GROUP_BITS):
            joint_MK = rows_MD.new_ones((len(rows_MD), 1))
            for dim in range(start, min(start + GROUP_BITS, self.bits)):
                low_M1, high_M1 = lows_MD[:, dim, None], highs_MD[:, dim, None]
                joint_MK = torch.cat([joint_MK * low_M1, joint_MK * high_M1], dim=1)
            together = together + entropy_of(joint_MK.mean(dim=0))
        return each_MD.sum(dim=1).mean() - together
