"""LPIPS: how different two images look, by the features of VGG16.

The heads (how much each feature counts) are in the file beside this one, from the ``lpips`` package
0.1.4, whose licence is there too; the package itself would bring torchvision and with it another
torch. The backbone has 59 MB of weights, and a file of them is given: ``vgg16`` of torchvision, as
``.pth`` or ``.safetensors``.

Source: Zhang et al. 2018, version 0.1 of the heads, as Esser et al. 2021 use it.
"""

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_chameleon.errors import DataError, first_line
from megatron_chameleon.files import open_to_read
from megatron_chameleon.values import printable

HEADS_FILE = Path(__file__).with_name("lpips_vgg16.safetensors")
CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each stage; between two stages the resolution is halved."""
MEAN, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What the pixels in [-1, 1] are shifted and divided by: the values of ImageNet."""
REMEDY = (
    "Give the weights of torchvision's vgg16 as a .pth or .safetensors file, "
    "or use training.perceptual=wavelet, which needs none"
)


class Lpips(nn.Module):
    """The distance. Its weights are frozen, and are no part of a saved state.

    Args:
        backbone: File of VGG16's weights.

    Raises:
        DataError: If the file cannot be read, or is not of VGG16.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, backbone: str | Path) -> None:
        super().__init__()
        self.features = _vgg16()
        self.features.load_state_dict(read_backbone(backbone))
        heads = load_file(HEADS_FILE)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        for stage in range(len(CHANNELS)):
            self.register_buffer(f"head_{stage}", heads[f"head.{stage}"].view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """The mean distance of the pairs of a batch, a scalar.

        Args:
            image_BCHW: Float [B, 3, H, W] in [-1, 1], of at least 16 x 16 pixels.
            target_BCHW: What it should look like.
        """
        with torch.no_grad():
            target = self.stages(target_BCHW)
        total = image_BCHW.new_zeros(())
        for stage, (x, y) in enumerate(zip(self.stages(image_BCHW), target, strict=True)):
            head_1C11 = getattr(self, f"head_{stage}")
            total = total + ((x - y).square() * head_1C11).sum(dim=1).mean()
        return total

    def stages(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """The features after each stage, of length 1 at each position."""
        x_BCHW = (pixels_BCHW - self.mean) / self.scale
        found: list[Tensor] = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(_of_length_1(x_BCHW))
            x_BCHW = layer(x_BCHW)
        return [*found, _of_length_1(x_BCHW)]


def _of_length_1(x_BCHW: Tensor) -> Tensor:
    # The published formula divides by sqrt(sum) + 1e-10, whose gradient is NaN where all features
    # of a position are 0: the smallest number is put under the root there.
    tiny = torch.finfo(x_BCHW.dtype).tiny
    return x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).clamp_min(tiny).sqrt() + 1e-10)


def _vgg16() -> nn.Sequential:
    """The convolutions up to the last stage, numbered as torchvision numbers them."""
    layers: list[nn.Module] = []
    before = 3
    for stage, widths in enumerate(CHANNELS):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """The convolutions of a VGG16 file, without ``features.`` before their names.

    Raises:
        DataError: If it cannot be read, or a tensor is missing or has another shape.
    """
    where = f"training.perceptual_backbone: {path}"
    with open_to_read(path):
        pass
    try:
        if Path(path).suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(where, f"cannot be read ({first_line(error)[:200]})", REMEDY) from error
    except Exception as error:  # torch.load raises all kinds for a file that it does not know
        what = f"is not a file of weights ({first_line(error)[:200]})"
        raise DataError(where, what, REMEDY) from error
    with torch.device("meta"):
        expected = _vgg16().state_dict()
    weights: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        value = found.get(f"features.{name}") if isinstance(found, dict) else None
        shape = tuple(value.shape) if isinstance(value, Tensor) else "missing"
        if not isinstance(value, Tensor) or shape != tuple(tensor.shape):
            names = sorted(map(str, found))[:1] if isinstance(found, dict) else []
            what = (
                f"features.{name} is {shape}, not {tuple(tensor.shape)}"
                f"{f'; its first tensor is {printable(names[0])}' if names else ''}"
            )
            raise DataError(where, what, REMEDY)
        if not bool(torch.isfinite(value.float()).all()):
            raise DataError(where, f"features.{name} has values that are not finite", REMEDY)
        weights[name] = value.float()
    return weights
