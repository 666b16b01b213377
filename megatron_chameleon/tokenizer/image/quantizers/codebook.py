"""The codebook of a VQGAN: the nearest of a table of learned vectors.

Source: van den Oord et al. 2017, equation 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.tokenizer.image.quantizers.quantized import Quantized

SEARCH_ROWS = 1024
"""Latents that are compared with the codebook at once, so that distances fit in a GPU's cache."""


class Codebook(nn.Module):
    """Replaces each latent vector by the nearest of ``codebook_size`` learned vectors."""

    def __init__(self, codebook_size: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @torch.no_grad()
    def nearest(self, latents_BDhw: Tensor) -> Tensor:
        """Indices of the nearest codebook vectors: int64 [B, N], row-major."""
        flat_MD = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, self.embedding.embedding_dim).float()
        weight_KD = self.embedding.weight
        norms_K = weight_KD.square().sum(dim=1)
        found = [
            self._nearest(rows_MD, weight_KD, norms_K) for rows_MD in flat_MD.split(SEARCH_ROWS)
        ]
        nearest_M = found[0] if len(found) == 1 else torch.cat(found)
        return nearest_M.view(latents_BDhw.shape[0], -1)

    def _nearest(self, flat_MD: Tensor, weight_KD: Tensor, norms_K: Tensor) -> Tensor:
        # |z - e|^2 is written out: it takes one matrix product and rounds as Hugging Face's code
        # does, so that ties agree.
        distances_MK = flat_MD.square().sum(dim=1, keepdim=True) + norms_K
        distances_MK -= 2 * flat_MD @ weight_KD.T
        return distances_MK.argmin(dim=1)

    def lookup(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codebook vectors of row-major codes: [B, D, h, w]."""
        vectors_BND = self.embedding(codes_BN)
        return vectors_BND.transpose(1, 2).unflatten(2, grid)

    def quantize(self, latents_BDhw: Tensor) -> Quantized:
        """One training pass; the gradient goes straight through to the latents."""
        codes_BN = self.nearest(latents_BDhw.detach())
        vectors_BDhw = self.lookup(codes_BN, (latents_BDhw.shape[2], latents_BDhw.shape[3]))
        return Quantized(
            codes_BN=codes_BN,
            straight_BDhw=latents_BDhw + (vectors_BDhw - latents_BDhw).detach(),
            codebook_loss=functional.mse_loss(vectors_BDhw, latents_BDhw.detach()),
            commitment_loss=functional.mse_loss(latents_BDhw, vectors_BDhw.detach()),
        )
