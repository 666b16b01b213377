"""The VQGAN: turns images into a grid of codebook indices and back.

Shape and parameter names are those of the released image tokenizer, so that its weights load
without changes and the encoder gives the same indices as Hugging Face's ``ChameleonVQVAE``.
Sources: Gafni et al. 2022 (Make-A-Scene), Esser et al. 2021 (VQGAN, sections 3.1 and A), paper
section 2.1.

Letters in tensor names: B images, C channels, H and W pixels, D width of a codebook vector, h and w
latent positions, N = h * w codes per image, M latents in all, K codebook vectors.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.tokenizer.image.network import FROM_MINUS_ONE_TO_ONE
from megatron_chameleon.tokenizer.image.quantizers.choose import make_quantizer
from megatron_chameleon.tokenizer.image.quantizers.quantized import Quantized
from megatron_chameleon.tokenizer.image.shape import NORM_GROUPS
from megatron_chameleon.tokenizer.image.shape import VqganConfig as VqganConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection, projected where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(functional.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(self.dropout(functional.silu(self.norm2(h_BCHW))))
        skip_BCHW = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        return skip_BCHW + h_BCHW


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_BNC, k_BNC, v_BNC = (
            conv(h_BCHW).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v)
        )
        mixed_BNC = functional.scaled_dot_product_attention(q_BNC, k_BNC, v_BNC)
        return x_BCHW + self.proj_out(mixed_BNC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halves height and width; like the released network, pads only on the right and the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then smooths with a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The lowest resolution: residual, attention, residual. No other level has attention."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next resolution, if any."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, dropout: float, resample: str | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in pairwise(widths))
        if resample == "down":
            self.downsample = Downsample(channels)
        elif resample == "up":
            self.upsample = Upsample(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, nn.ModuleList):
                for block in layer:
                    x_BCHW = block(x_BCHW)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


class VqganEncoder(nn.Module):
    """Pixels [B, 3, H, W] to latents [B, z_channels, h, w]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.base_channels
        for level, width in enumerate(widths):
            resample = "down" if level < len(widths) - 1 else None
            self.down.append(
                Level(previous, width, config.num_res_blocks, config.dropout, resample)
            )
            previous = width
        self.mid = Middle(previous, config.dropout)
        self.norm_out = _norm(previous)
        self.conv_out = nn.Conv2d(previous, config.z_channels, 3, padding=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(pixels_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x_BCHW))))


class VqganDecoder(nn.Module):
    """Latents [B, z_channels, h, w] to pixels [B, 3, H, W]; ``up.0`` (full size) runs last."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.dropout)
        levels = []
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            resample = "up" if level > 0 else None
            blocks = config.num_res_blocks + 1
            levels.append(Level(previous, widths[level], blocks, config.dropout, resample))
            previous = widths[level]
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(previous)
        self.conv_out = nn.Conv2d(previous, config.in_channels, 3, padding=1)

    def forward(self, latents_BDhw: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(latents_BDhw))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(functional.silu(self.norm_out(x_BCHW)))


@dataclass
class VqganOutput:
    """The results of one training pass."""

    reconstruction_BCHW: Tensor
    codes_BN: Tensor
    latents_BDhw: Tensor
    """The encoder's latents before they are replaced by codebook vectors."""
    codebook_loss: Tensor
    """Mean squared distance of the codebook vectors from the (detached) latents."""
    commitment_loss: Tensor
    """Mean squared distance of the latents from the (detached) codebook vectors."""
    entropy_loss: Tensor | None = None
    """Low if each code is certain and all are used; ``lfq`` and ``ibq`` have it."""


class Vqgan(nn.Module):
    """VqganEncoder, codebook and decoder; an ``ImageNetwork``. Pixels are in [-1, 1].

    Args:
        config: Its shape.
        has_decoder: Whether it can turn codes into images.
    """

    fixed_grid = False
    pixel_rule = FROM_MINUS_ONE_TO_ONE

    def __init__(self, config: VqganConfig, *, has_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = VqganEncoder(config)
        self.has_decoder = has_decoder
        if has_decoder:
            self.decoder = VqganDecoder(config)
        self.quantize: Any = make_quantizer(
            config.quantizer, config.codebook_size, config.embed_dim
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def convolve_in(self, dtype: torch.dtype, memory_format: torch.memory_format) -> "Vqgan":
        """Compute everything except the codebook distances in another type and memory format."""
        for part in (*self._networks(), self.quant_conv, self.post_quant_conv):
            part.to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        return self

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels per code along each axis."""
        return self.config.downsampling

    @property
    def resolution(self) -> int:
        """Width and height in pixels of the square that it is made for."""
        return self.config.resolution

    def compile_networks(self, backend: str = "inductor", mode: str | None = None) -> "Vqgan":
        """Let ``torch.compile`` fuse norms, activations and skips; it compiles per batch size."""
        for part in self._networks():
            part.compile(backend=backend, mode=mode, fullgraph=True, dynamic=False)
        return self

    def _networks(self) -> list[nn.Module]:
        return [self.encoder, self.decoder] if self.has_decoder else [self.encoder]

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """The latents that are compared with the codebook: [B, embed_dim, h, w]."""
        return self.quant_conv(self.encoder(pixels_BCHW.to(self.quant_conv.weight.dtype)))

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Image codes: int64 [B, N], row-major."""
        return self.quantize.nearest(self.latents(pixels_BCHW))

    def decode(
        self, codes_BN: Tensor, rows: int | None = None, columns: int | None = None
    ) -> Tensor:
        """Pixels of image codes: [B, 3, H, W]; not clamped to [-1, 1].

        Args:
            codes_BN: int64 [B, rows * columns], row-major.
            rows: Height of the grid of codes; without it, the config's.
            columns: Its width; without it, the config's.
        """
        grid = (rows or self.config.grid, columns or self.config.grid)
        vectors_BDhw = self.quantize.lookup(codes_BN, grid)
        return self.decoder(
            self.post_quant_conv(vectors_BDhw.to(self.post_quant_conv.weight.dtype))
        )

    def forward(self, pixels_BCHW: Tensor) -> VqganOutput:
        """One training pass; the decoder's gradient goes straight through to the encoder.

        The commitment weight belongs to the term that moves the encoder (van den Oord et al. 2017,
        equation 3). The reference code puts it on the other term, an old mistake that it keeps for
        compatibility; this does not affect the codes.
        """
        latents_BDhw = self.latents(pixels_BCHW)
        with torch.autocast(latents_BDhw.device.type, enabled=False):  # bf16 rounds distances
            found: Quantized = self.quantize.quantize(latents_BDhw.float())
        return VqganOutput(
            reconstruction_BCHW=self.decoder(self.post_quant_conv(found.straight_BDhw)),
            codes_BN=found.codes_BN,
            latents_BDhw=latents_BDhw,
            codebook_loss=found.codebook_loss,
            commitment_loss=found.commitment_loss,
            entropy_loss=found.entropy_loss,
        )
