import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.image.config import ImageTrainingConfig, load_image_config
from megatron_chameleon.tokenizer.image.losses.discriminator import PatchDiscriminator
from megatron_chameleon.tokenizer.image.losses.perceptual import perceptual_loss
from megatron_chameleon.tokenizer.image.losses.spectral import SpectralLoss, WaveletLoss
from megatron_chameleon.tokenizer.image.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
TINY += ["model.z_channels=8", "model.embed_dim=8", "training.batch_size=4"]


@pytest.mark.parametrize(
    ("kind", "loss", "line"),
    [
        (
            "spectral",
            SpectralLoss,
            "perceptual loss: spectral, which needs no pretrained weights",
        ),
        ("wavelet", WaveletLoss, "perceptual loss: wavelet, which needs no pretrained weights, "),
        ("auto", WaveletLoss, "because training.perceptual_backbone is not set, so there are no"),
    ],
)
def test_a_line_says_which_loss_is_used(
    kind: str, loss: type, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = ImageTrainingConfig(perceptual=kind, perceptual_weight=0.5)
    with caplog.at_level(logging.INFO):
        assert isinstance(perceptual_loss(config, CPU), loss)
    assert len(caplog.messages) == 1 and line in caplog.messages[0]
    assert "weight 0.5" in caplog.messages[0]


def test_without_one_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert perceptual_loss(ImageTrainingConfig(), CPU) is None
        without = ImageTrainingConfig(perceptual="lpips", perceptual_weight=0)
        assert perceptual_loss(without, CPU) is None
    assert not caplog.messages


def test_a_backbone_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = ImageTrainingConfig(perceptual="auto", perceptual_backbone=str(tmp_path / "vgg.pth"))
    with pytest.raises(DataError, match=r"vgg\.pth"):
        perceptual_loss(config, CPU)


def test_the_discriminator_is_weighted_as_published() -> None:
    """``calculate_adaptive_weight`` of Esser et al.'s code, on gradients of a step of ours.

    Its reconstruction loss has the perceptual loss in it. The weight is
    ``clamp(|grad rec| / (|grad g| + 1e-4), 0, 1e4) * discriminator_weight``.
    """
    words = ["training.discriminator_weight=0.8", "training.discriminator_layers=1"]
    words += ["training.perceptual=spectral", "training.perceptual_weight=0.7"]
    words += ["training.discriminator_start=2", "training.discriminator_channels=8"]
    torch.manual_seed(0)
    trainer = Trainer(load_image_config("digits", [*TINY, *words]), seed=0, device=CPU)
    pixels = torch.rand(4, 3, 8, 8) * 2 - 1
    output = trainer.model(pixels)
    fake = output.reconstruction_BCHW
    last = trainer.model.decoder.conv_out.weight
    assert trainer.discriminator is not None
    rec = (fake - pixels).abs().mean() + 0.7 * SpectralLoss()(fake, pixels)
    g = -torch.mean(trainer.discriminator(fake))
    nll_grads = torch.autograd.grad(rec, last, retain_graph=True)[0]
    g_grads = torch.autograd.grad(g, last, retain_graph=True)[0]
    d_weight = torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4)
    d_weight = torch.clamp(d_weight, 0.0, 1e4).detach() * 0.8
    codebook = output.codebook_loss + 0.25 * output.commitment_loss
    before, after = (trainer.network_loss(output, pixels, step, {}).item() for step in (1, 2))
    assert before == pytest.approx((rec + codebook).item(), rel=1e-5)
    assert after == pytest.approx((rec + codebook + d_weight * g).item(), rel=1e-5)
    assert abs(after - before) > 1e-3


def test_the_discriminator_is_that_of_pix2pix() -> None:
    """The layers of ``NLayerDiscriminator`` with ``n_layers=3``, and its losses."""
    layers = [
        (type(layer).__name__, layer.in_channels, layer.out_channels, layer.stride[0])
        for layer in PatchDiscriminator(3, 64, 3).main
        if isinstance(layer, torch.nn.Conv2d)
    ]
    assert layers == [
        ("Conv2d", 3, 64, 2),
        ("Conv2d", 64, 128, 2),
        ("Conv2d", 128, 256, 2),
        ("Conv2d", 256, 512, 1),
        ("Conv2d", 512, 1, 1),
    ]


def test_a_perceptual_loss_moves_the_network() -> None:
    pixels = torch.rand(4, 3, 8, 8) * 2 - 1
    weights = []
    for words in ([], ["training.perceptual=wavelet"]):
        torch.manual_seed(0)
        trainer = Trainer(load_image_config("digits", [*TINY, *words]), seed=0, device=CPU)
        losses, output = trainer.step(pixels, 0)
        weights.append(trainer.model.decoder.conv_out.weight.detach().clone())
    assert "perceptual" in losses and not torch.equal(*weights)
    expected = WaveletLoss()(output.reconstruction_BCHW, pixels)
    assert losses["perceptual"].item() == pytest.approx(expected.item())
    assert functional.l1_loss(output.reconstruction_BCHW, pixels).item() > 0
