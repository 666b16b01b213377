"""What ``ImageTokenizer`` needs of a network, and that today's VQGAN gives it."""

import numpy as np
import pytest
import torch

from megatron_chameleon.tokenizer.image.network import FROM_MINUS_ONE_TO_ONE, PixelRule
from megatron_chameleon.tokenizer.image.tokenizer import to_images
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)


@pytest.fixture
def model() -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(VqganConfig(16, 3, 32, [1, 1, 1], 1, 8, 8, 32)).eval()


def test_the_rule_of_the_vqgan_is_bit_for_bit_the_one_of_the_first_version() -> None:
    first = EVERY_VALUE.float().mul(2 / 255).sub(1)
    assert torch.equal(FROM_MINUS_ONE_TO_ONE.to_floats(EVERY_VALUE), first)

    torch.manual_seed(1)
    drawn = torch.randn(2, 3, 64, 64) * 2
    bytes_back = drawn.clamp(-1, 1).add(1).mul(255 / 2).round().to(torch.uint8)
    assert torch.equal(FROM_MINUS_ONE_TO_ONE.to_bytes(drawn), bytes_back)


@pytest.mark.parametrize(
    "rule",
    [
        FROM_MINUS_ONE_TO_ONE,
        PixelRule(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        PixelRule(1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.275777)),
        PixelRule(1.0, (0.0, 10.0, 20.0), (1.0, 1.0, 2.0)),
    ],
)
def test_every_value_comes_back(rule: PixelRule) -> None:
    assert torch.equal(rule.to_bytes(rule.to_floats(EVERY_VALUE)), EVERY_VALUE)


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    rule = PixelRule(0.5, (1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    pixels = rule.to_floats(torch.full((1, 3, 1, 1), 10, dtype=torch.uint8))
    assert pixels.flatten().tolist() == [4.0, 1.5, 0.5]
    (image,) = to_images(pixels, rule)
    np.testing.assert_array_equal(np.asarray(image), [[[10, 10, 10]]])


def test_a_picture_of_another_shape_has_a_grid_of_its_shape(model: Vqgan) -> None:
    pixels = torch.rand(2, 3, 24, 8) * 2 - 1
    codes = model.encode(pixels)
    assert codes.shape == (2, 6 * 2)
    assert model.decode(codes, 6, 2).shape == pixels.shape
    # row-major: the last row of codes sees nothing of the picture's first pixels but the attention
    latents = model.latents(pixels)
    assert torch.equal(codes[0].view(6, 2)[5], model.quantize.nearest(latents)[0, 10:])


def test_the_square_is_the_default(model: Vqgan) -> None:
    assert (model.resolution, model.downsampling, model.codebook_size) == (16, 4, 32)
    assert model.has_decoder and not model.fixed_grid
    codes = torch.arange(16)[None]
    assert torch.equal(model.decode(codes), model.decode(codes, 4, 4))
