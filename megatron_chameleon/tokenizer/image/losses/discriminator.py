"""The patch discriminator and the adversarial losses of the VQGAN.

Sources: Esser et al. 2021, section 3.1, with the constants of its code (the adaptive weight is at
most 1e4, and 1e-4 is added to the norm that divides); Isola et al. 2017.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Convolutions that judge each patch of an image: real (above 0) or reconstructed (below 0).

    Args:
        in_channels: Channels of the image.
        channels: Channels after the first convolution; each further layer doubles them, up to eight
            times as many.
        layers: Layers that halve the resolution. At least 3 pixels must remain; see
            ``smallest_resolution`` in shape.py.
    """

    def __init__(self, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for layer, (width, wider) in enumerate(pairwise(widths), start=1):
            stride = 2 if layer < layers else 1
            blocks += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits of the patches: [B, 1, h, w]."""
        return self.main(pixels_BCHW)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The loss of the discriminator."""
    return 0.5 * (functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean())


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """The factor at which both losses' gradients at the decoder's last layer are equally large.

    Args:
        reconstruction_loss: A scalar.
        adversarial_loss: A scalar.
        last_layer: The weights whose gradients are compared.
        mean: Takes the mean of a gradient over the processes that share the batch.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio = mean(reconstruction).norm() / (mean(adversarial).norm() + 1e-4)
    return ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).detach()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
