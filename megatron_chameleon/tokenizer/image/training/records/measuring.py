"""What a tokenizer makes of pictures that it was not trained on."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_chameleon.tokenizer.image.tokenizer import to_images, to_pixels
from megatron_chameleon.tokenizer.image.training.records.similarity import psnr, ssim
from megatron_chameleon.tokenizer.image.vqgan import Vqgan

MEASURED_PICTURES = 64
SHOWN_PICTURES = 12


@dataclass(frozen=True)
class Measurement:
    """Of some pictures, and of how a network draws them."""

    psnr: float
    """Peak signal-to-noise ratio over all of their pixels, dB."""
    ssim: float
    """Mean structural similarity."""
    codes_used: int
    """Different codes in all of them."""
    shown: np.ndarray = field(repr=False)
    """What the first of them became: uint8 [at most SHOWN_PICTURES, H, W, 3]."""


@torch.no_grad()
def measure(model: Vqgan, images_NHWC: np.ndarray, batch_size: int) -> Measurement:
    """Draw pictures from their codes, and compare.

    Args:
        model: The network; it stays in the mode that it is in.
        images_NHWC: Prepared pictures, uint8.
        batch_size: Pictures of a pass.
    """
    device = next(model.parameters()).device
    is_training = model.training
    model.eval()
    used_K = torch.zeros(model.config.codebook_size, dtype=torch.bool, device=device)
    squared, similar = 0.0, 0.0
    shown: list[np.ndarray] = []
    for start in range(0, len(images_NHWC), batch_size):
        real_BCHW = to_pixels(images_NHWC[start : start + batch_size]).to(device)
        codes_BN = model.encode(real_BCHW)
        used_K[codes_BN.flatten()] = True
        fake_BCHW = model.decode(codes_BN).float().clamp(-1, 1)
        real_BCHW, drawn_BCHW = _as_bytes(real_BCHW), _as_bytes(fake_BCHW)
        squared += (drawn_BCHW - real_BCHW).square().sum().item()
        similar += ssim(drawn_BCHW, real_BCHW).sum().item()
        if len(shown) < SHOWN_PICTURES:
            shown += [np.asarray(image) for image in to_images(fake_BCHW)]
    model.train(is_training)
    return Measurement(
        psnr=psnr(squared / images_NHWC.size),
        ssim=similar / len(images_NHWC),
        codes_used=int(used_K.sum()),
        shown=np.stack(shown[:SHOWN_PICTURES]),
    )


def _as_bytes(pixels_BCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1] as those of an image of 8 bits, in steps from 0 to 1."""
    return pixels_BCHW.double().add(1).mul(255 / 2).round().div(255)
