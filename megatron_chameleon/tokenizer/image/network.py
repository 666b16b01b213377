"""What an image tokenizer needs of a network: pixels to codes and back, and a few facts.

``Vqgan`` is one; ``ImageTokenizer`` works with any of them. Letters in tensor names are those of
``vqgan.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelRule:
    """How the values of an image, 0 to 255, become the numbers that a network reads.

    A value v of a channel becomes ``(v * rescale - mean) / std``, as transformers' image processors
    have it.
    """

    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_floats(self, bytes_BCHW: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to float32 of the same shape and order."""
        if self == FROM_MINUS_ONE_TO_ONE:
            return bytes_BCHW.float().mul(self.rescale).sub(1)
        # rounded as in transformers' processors, so that no code on a border becomes another
        pixels = bytes_BCHW.double().mul(self.rescale).float()
        pixels = pixels.sub(self._of_channels(self.mean, bytes_BCHW))
        return pixels.div(self._of_channels(self.std, bytes_BCHW))

    def to_bytes(self, pixels_BCHW: Tensor) -> Tensor:
        """The inverse of ``to_floats``, rounded; values beyond black and white are clamped."""
        pixels = pixels_BCHW.float().mul(self._of_channels(self.std, pixels_BCHW))
        values = pixels.add(self._of_channels(self.mean, pixels)).mul(1 / self.rescale)
        return values.clamp(0, 255).round().to(torch.uint8)

    def _of_channels(self, values: tuple[float, float, float], like: Tensor) -> Tensor | float:
        """One value if the channels have the same, else float32 [3, 1, 1] where ``like`` is."""
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(3, 1, 1)


FROM_MINUS_ONE_TO_ONE = PixelRule(2 / 255, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
"""0 becomes -1 and 255 becomes 1."""


class ImageNetwork(Protocol):
    """Turns pixels into image codes and back. It is a ``torch.nn.Module`` with these attributes.

    Attributes:
        codebook_size: Number of image codes.
        downsampling: Pixels per code along each axis.
        resolution: Width and height in pixels of the square that it is made for.
        has_decoder: Whether it can turn codes into pixels.
        fixed_grid: Whether it can take nothing else than that square.
        pixel_rule: How the values of an image become its numbers.
    """

    @property
    def codebook_size(self) -> int: ...
    @property
    def downsampling(self) -> int: ...
    @property
    def resolution(self) -> int: ...
    @property
    def has_decoder(self) -> bool: ...
    @property
    def fixed_grid(self) -> bool: ...
    @property
    def pixel_rule(self) -> PixelRule: ...

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Image codes of pixels.

        Args:
            pixels_BCHW: float32 [B, 3, H, W], made by ``pixel_rule``. H and W are multiples of
                ``downsampling``.

        Returns:
            int64 [B, rows * columns], row-major, in [0, codebook_size).
        """
        ...

    def decode(self, codes_BN: Tensor, rows: int, columns: int) -> Tensor:
        """Pixels of image codes.

        Args:
            codes_BN: int64 [B, rows * columns], row-major, in [0, codebook_size).
            rows: Height of the grid of codes.
            columns: Its width.

        Returns:
            [B, 3, rows * downsampling, columns * downsampling], of the numbers of ``pixel_rule``;
            not clamped.
        """
        ...

    def convolve_in(self, dtype: torch.dtype, memory_format: torch.memory_format) -> Self:
        """Compute what may be computed so in another type and memory format.

        The comparison with the codebook stays in the type of its weights.
        """
        ...

    def compile_networks(self, backend: str = "inductor") -> Self:
        """Let ``torch.compile`` fuse operations, if it can compile the network."""
        ...

    # from torch.nn.Module

    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def eval(self) -> Self: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def float(self) -> Self: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], *, assign: bool = False) -> Any: ...
