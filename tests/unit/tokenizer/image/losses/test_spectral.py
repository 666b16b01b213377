import numpy as np
import pytest
import pywt
import torch

from megatron_chameleon.tokenizer.image.losses.spectral import (
    LEVELS,
    SpectralLoss,
    WaveletLoss,
    haar,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    return first, second


def test_the_wavelets_are_those_of_pywavelets(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    image = pair[0]
    low, details = haar(image)
    expected_low, expected = pywt.dwt2(image.numpy(), "haar")
    np.testing.assert_allclose(low, expected_low, atol=1e-6)
    # Haar's sign is a convention, and the loss takes absolute values
    for ours, theirs in zip(details, (expected[1], expected[0], expected[2]), strict=True):
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-6)


def test_the_wavelet_loss_is_the_mean_over_levels(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    first, second = pair
    levels = pywt.wavedec2((first - second).numpy(), "haar", level=LEVELS)[1:]
    expected = np.mean([np.abs(np.stack(level)).mean() for level in levels])
    assert WaveletLoss()(first, second).item() == pytest.approx(expected, rel=1e-5)


def test_the_spectral_loss_is_that_of_numpy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    def spectra(pixels: torch.Tensor, size: int) -> np.ndarray:
        ramp = np.arange(size) / size
        window = 0.5 - 0.5 * np.cos(2 * np.pi * ramp)
        image, hop = pixels.double().numpy(), size // 2
        return np.stack(
            [
                np.abs(
                    np.fft.rfft2(image[..., y : y + size, x : x + size] * np.outer(window, window))
                )
                / size
                for y in range(0, 32 - size + 1, hop)
                for x in range(0, 48 - size + 1, hop)
            ]
        )

    expected = np.mean(
        [np.abs(spectra(pair[0], size) - spectra(pair[1], size)).mean() for size in (8, 16, 32)]
    )
    # 1e-8 under the root, which is there for the gradient, moves magnitudes by up to 1e-4
    assert SpectralLoss()(*pair).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [SpectralLoss(), WaveletLoss()])
@pytest.mark.parametrize("side", [8, 9, 17, 40])
def test_equal_images_cost_nothing_and_any_size_has_a_gradient(
    loss: torch.nn.Module, side: int
) -> None:
    target = torch.rand(1, 3, side, side + 3)
    assert loss(target, target).item() == 0
    for image in (torch.zeros_like(target), target.clone()):
        image.requires_grad_()
        loss(image, target).backward()
        assert image.grad is not None and bool(torch.isfinite(image.grad).all())


def test_a_blurred_texture_costs_more_than_a_shifted_one() -> None:
    """What the pixel loss cannot tell: a texture that is moved by a pixel is as far off as none."""
    texture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shifted, blurred = texture.roll(1, dims=3), torch.zeros_like(texture)
    loss = SpectralLoss()
    assert (shifted - texture).abs().mean() > (blurred - texture).abs().mean()
    assert loss(shifted, texture) < 0.6 * loss(blurred, texture)
