"""Perceptual losses that need no pretrained weights: local spectra, and wavelets.

Both judge an image by its frequencies at several scales, so that a blurred texture costs more than
its pixels alone say. Neither knows what an image shows, as a network that was trained on images
does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

WINDOWS = (8, 16, 32)
"""Widths of the squares whose spectra are compared, in pixels; larger ones than the image are left
out."""
LEVELS = 4
"""Scales of the wavelet loss; small images have fewer."""


class SpectralLoss(nn.Module):
    """Mean absolute difference of the magnitudes of local spectra, over several window sizes.

    An image is cut into squares that overlap by half, under a Hann window, and each is Fourier
    transformed (orthonormal). The magnitudes say how much of a frequency is there and not where, so
    a texture that is shifted by a pixel is right. It is the image counterpart of the multi-scale
    spectrogram losses of audio codecs.
    """

    def forward(self, image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """The loss, a scalar. Both are float [B, C, H, W] in [-1, 1], of at least 8 x 8 pixels."""
        sizes = [size for size in WINDOWS if size <= min(image_BCHW.shape[-2:])]
        total = image_BCHW.new_zeros(())
        for size in sizes:
            found, wanted = _spectra(image_BCHW, size), _spectra(target_BCHW, size)
            total = total + functional.l1_loss(found, wanted)
        return total / len(sizes)


def _spectra(pixels_BCHW: Tensor, size: int) -> Tensor:
    """Magnitudes of the spectra of all squares: [B, C, rows, columns, size, size // 2 + 1]."""
    hop = size // 2
    squares = pixels_BCHW.unfold(2, size, hop).unfold(3, size, hop)
    window = torch.hann_window(size, device=pixels_BCHW.device, dtype=pixels_BCHW.dtype)
    transformed = torch.fft.rfft2(squares * window * window[:, None], norm="ortho")
    # the magnitude has no gradient at 0
    return (transformed.real.square() + transformed.imag.square() + 1e-8).sqrt()


class WaveletLoss(nn.Module):
    """Mean absolute difference of the Haar wavelet coefficients, over several scales.

    Each level has as much weight as the others, and the means that the last level leaves are left
    to the pixel loss.
    """

    def forward(self, image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """The loss, a scalar. Both are float [B, C, H, W] in [-1, 1], of at least 2 x 2 pixels."""
        rest_BCHW = image_BCHW - target_BCHW  # the transform is linear
        details: list[Tensor] = []
        while len(details) < LEVELS and min(rest_BCHW.shape[-2:]) >= 2:
            rest_BCHW, detail = haar(rest_BCHW)
            details.append(detail.abs().mean())
        return torch.stack(details).mean()


def haar(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal Haar transform; an odd last row or column is left out.

    Returns:
        The low frequencies [B, C, H/2, W/2], and the three details [3, B, C, H/2, W/2]: of the
        columns, the rows and the diagonals.
    """
    height, width = (side // 2 * 2 for side in pixels_BCHW.shape[-2:])
    even, odd = (pixels_BCHW[..., row:height:2, :width] for row in (0, 1))
    parts = [
        (rows[..., 0::2] + sign * rows[..., 1::2]) / 2
        for rows in (even + odd, even - odd)
        for sign in (1, -1)
    ]
    return parts[0], torch.stack(parts[1:])
