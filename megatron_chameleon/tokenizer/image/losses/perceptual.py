"""Which perceptual loss a training uses, and the line that says so."""

import logging

import torch
from torch import nn

from megatron_chameleon.tokenizer.image.config import ImageTrainingConfig
from megatron_chameleon.tokenizer.image.losses.lpips import Lpips
from megatron_chameleon.tokenizer.image.losses.spectral import SpectralLoss, WaveletLoss

logger = logging.getLogger(__name__)

WITHOUT_WEIGHTS = {"spectral": SpectralLoss, "wavelet": WaveletLoss}


def perceptual_loss(config: ImageTrainingConfig, device: torch.device) -> nn.Module | None:
    """The perceptual loss of a training; None if it has none.

    What it returns is called with the reconstruction and the original, float [B, 3, H, W] in
    [-1, 1], and gives a scalar.

    Raises:
        DataError: If the weights of LPIPS cannot be read.
    """
    kind = config.perceptual_kind
    if kind == "none":
        return None
    why = ""
    if config.perceptual == "auto":
        given = "is set" if kind == "lpips" else "is not set, so there are no weights for LPIPS"
        why = f", because training.perceptual_backbone {given}"
    weight = f"weight {config.perceptual_weight:g}"
    if kind == "lpips":
        logger.info("perceptual loss: LPIPS with %s, %s%s", config.perceptual_backbone, weight, why)
        return Lpips(config.perceptual_backbone).to(device)
    logger.info("perceptual loss: %s, which needs no pretrained weights, %s%s", kind, weight, why)
    return WITHOUT_WEIGHTS[kind]()
