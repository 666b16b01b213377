"""What every quantizer offers."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Quantized:
    """The results of one training pass through a quantizer."""

    codes_BN: Tensor
    straight_BDhw: Tensor
    """The vectors of the codes, whose gradient reaches the latents."""
    codebook_loss: Tensor
    """Moves the codebook to the latents; 0 where there is no codebook."""
    commitment_loss: Tensor
    """Mean squared distance of the latents from the (detached) vectors."""
    entropy_loss: Tensor | None = None
    """The mean entropy of a latent's code less the entropy of the codes of the batch; low if each
    code is certain and all codes are used."""


class Quantizer(Protocol):
    """Turns latents into codes and back. It is a ``torch.nn.Module``."""

    def nearest(self, latents_BDhw: Tensor) -> Tensor:
        """Codes of latents: int64 [B, N], row-major."""
        ...

    def lookup(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Vectors of row-major codes: [B, D, h, w]."""
        ...

    def quantize(self, latents_BDhw: Tensor) -> Quantized:
        """One training pass."""
        ...


def rows_of(latents_BDhw: Tensor) -> Tensor:
    """Latents as rows: [B * N, D]."""
    return latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
