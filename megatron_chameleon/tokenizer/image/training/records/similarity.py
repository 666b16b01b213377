"""How similar two images are: PSNR and SSIM."""

import math

import torch
from torch import Tensor
from torch.nn import functional

WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
BEST_PSNR = 120.0
"""Of images that do not differ at all."""


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB.

    Args:
        squared_error: Mean squared difference of images whose values span 1.
    """
    return BEST_PSNR if squared_error <= 0 else min(-10 * math.log10(squared_error), BEST_PSNR)


def ssim(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Structural similarity of pairs of images, a mean over channels and places: [B].

    Args:
        first_BCHW: Images whose values span 1.
        second_BCHW: Of the same shape.

    Source: Wang et al. 2004, with their Gaussian window of 11 pixels. scikit-image gives the same
    with ``gaussian_weights=True, use_sample_covariance=False``. Images below 11 pixels get a window
    of as many as they have.
    """
    first_BCHW, second_BCHW = first_BCHW.double(), second_BCHW.double()
    window = _window(first_BCHW)
    channels = first_BCHW.shape[1]

    def mean(values_BCHW: Tensor) -> Tensor:
        return functional.conv2d(values_BCHW, window, groups=channels)

    mean_1, mean_2 = mean(first_BCHW), mean(second_BCHW)
    variance_1 = mean(first_BCHW.square()) - mean_1.square()
    variance_2 = mean(second_BCHW.square()) - mean_2.square()
    covariance = mean(first_BCHW * second_BCHW) - mean_1 * mean_2
    upper = (2 * mean_1 * mean_2 + _C1) * (2 * covariance + _C2)
    lower = (mean_1.square() + mean_2.square() + _C1) * (variance_1 + variance_2 + _C2)
    return (upper / lower).mean((1, 2, 3))


def _window(images_BCHW: Tensor) -> Tensor:
    """One window for each channel: [C, 1, h, w]."""
    sides = []
    for side in images_BCHW.shape[2:]:
        size = min(WINDOW, side)
        places = torch.arange(size, dtype=torch.float64, device=images_BCHW.device)
        weights = torch.exp(-(((places - (size - 1) / 2) / SIGMA) ** 2) / 2)
        sides.append(weights / weights.sum())
    window = torch.outer(*sides)
    return window.expand(images_BCHW.shape[1], 1, *window.shape)
