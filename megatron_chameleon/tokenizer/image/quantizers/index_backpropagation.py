"""Index backpropagation: a codebook all of whose vectors learn in every step.

Source: Shi et al. 2024 (IBQ): the code is the vector with the largest inner product, and the
gradient of the softmax over all of them takes the place of that of the choice.
"""

from torch import Tensor
from torch.nn import functional

from megatron_chameleon.tokenizer.image.quantizers.codebook import Codebook
from megatron_chameleon.tokenizer.image.quantizers.entropy import entropy_of
from megatron_chameleon.tokenizer.image.quantizers.quantized import Quantized, rows_of


class IndexBackpropagation(Codebook):
    """Replaces each latent vector by the one with the largest inner product.

    Args:
        codebook_size: Number of vectors.
        embed_dim: Their width.
        temperature: Of the softmax whose entropy is measured.
    """

    def __init__(self, codebook_size: int, embed_dim: int, temperature: float) -> None:
        super().__init__(codebook_size, embed_dim)
        self.temperature = temperature

    def _nearest(self, flat_MD: Tensor, weight_KD: Tensor, norms_K: Tensor) -> Tensor:
        return (flat_MD @ weight_KD.T).argmax(dim=1)

    def quantize(self, latents_BDhw: Tensor) -> Quantized:
        """One training pass.

        ``codebook_loss`` is the published double quantization loss: of the vectors through the
        softmax, and of the chosen ones. Its memory grows with latents times codebook vectors.
        """
        grid = (latents_BDhw.shape[2], latents_BDhw.shape[3])
        codes_BN = self.nearest(latents_BDhw.detach())
        weight_KD = self.embedding.weight
        logits_MK = rows_of(latents_BDhw).float() @ weight_KD.T
        soft_MK = logits_MK.softmax(dim=1)
        hard_MK = functional.one_hot(codes_BN.flatten(), len(weight_KD)).to(soft_MK.dtype)
        chosen_MK = hard_MK - soft_MK.detach() + soft_MK
        straight_MD = chosen_MK @ weight_KD
        straight_BDhw = straight_MD.view(len(codes_BN), *grid, -1).permute(0, 3, 1, 2)
        vectors_BDhw = self.lookup(codes_BN, grid)
        return Quantized(
            codes_BN=codes_BN,
            straight_BDhw=straight_BDhw,
            codebook_loss=functional.mse_loss(straight_BDhw, latents_BDhw)
            + functional.mse_loss(vectors_BDhw, latents_BDhw.detach()),
            commitment_loss=functional.mse_loss(latents_BDhw, vectors_BDhw.detach()),
            entropy_loss=self._entropy_loss(logits_MK),
        )

    def _entropy_loss(self, logits_MK: Tensor) -> Tensor:
        logs_MK = (logits_MK / self.temperature).log_softmax(dim=1)
        probabilities_MK = logs_MK.exp()
        each = -(probabilities_MK * logs_MK).sum(dim=1).mean()
        return each - entropy_of(probabilities_MK.mean(dim=0))
