"""The codebook as moving averages of the latents, in place of the codebook loss.

Source: van den Oord et al. 2017, appendix A.1; Laplace smoothing of the counts and its constant are
those of the authors' ``VectorQuantizerEMA``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_chameleon.tokenizer.image.quantizers.codebook import Codebook

EPSILON = 1e-5


class MovingAverages:
    """Counts and sums of the latents of each code; the codebook's vectors are their quotients.

    Args:
        codebook: Its vectors are set, and get no gradient any more.
        decay: Share of the averages that a step keeps.
        total: Adds up a tensor over the processes that share a batch.
    """

    def __init__(
        self,
        codebook: Codebook,
        decay: float,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.codebook = codebook
        self.decay = decay
        self.total = total
        weight_KD = codebook.embedding.weight.requires_grad_(False)
        self.counts_K = torch.ones_like(weight_KD[:, 0])
        self.sums_KD = weight_KD.detach().clone()

    @torch.no_grad()
    def restart(self, codes: Tensor | slice = slice(None)) -> None:
        """Begin anew from what the vectors of some codes have been set to."""
        self.counts_K[codes] = 1
        self.sums_KD[codes] = self.codebook.embedding.weight[codes]

    @torch.no_grad()
    def update(self, rows_MD: Tensor, codes_M: Tensor) -> None:
        """Move the averages towards a batch, and the vectors with them.

        Args:
            rows_MD: Latents of this process.
            codes_M: The codes that they were given.
        """
        counts_K = codes_M.bincount(minlength=len(self.counts_K)).to(self.counts_K.dtype)
        sums_KD = torch.zeros_like(self.sums_KD).index_add_(0, codes_M, rows_MD.to(self.sums_KD))
        self.counts_K.lerp_(self.total(counts_K), 1 - self.decay)
        self.sums_KD.lerp_(self.total(sums_KD), 1 - self.decay)
        together, codes = self.counts_K.sum(), len(self.counts_K)
        smooth_K = (self.counts_K + EPSILON) / (together + codes * EPSILON) * together
        self.codebook.embedding.weight.copy_(self.sums_KD / smooth_K[:, None])

    def state_dict(self) -> dict[str, Tensor]:
        """Both averages."""
        return {"counts": self.counts_K, "sums": self.sums_KD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.counts_K.copy_(state["counts"])
        self.sums_KD.copy_(state["sums"])
