"""The shape of an image tokenizer's networks, without torch, whose import takes seconds."""

from dataclasses import dataclass, field
from typing import Annotated

from megatron_chameleon.config.constraints import Below, Between, OneOf, find_violations
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import shown

NORM_GROUPS = 32
MOST_LEVELS = 12
KEPT_PER_BLOCK = 6
"""Feature maps that a residual block keeps for its backward pass: the inputs of its two norms, two
activations and two convolutions."""


@dataclass
class VqganConfig:
    """Shape of the network. The defaults are the paper's."""

    resolution: Annotated[int, Between(1, 8192)] = 512
    """Width and height of an image in pixels."""
    in_channels: Annotated[int, OneOf(3)] = 3
    """Red, green and blue."""
    base_channels: Annotated[int, Between(1, 4096)] = 128
    """Channels at full resolution; a multiple of 32 (GroupNorm has 32 groups)."""
    ch_mult: list[Annotated[int, Between(1, 64)]] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of each level in units of base_channels; each level but the last halves the
    resolution."""
    num_res_blocks: Annotated[int, Between(1, 64)] = 2
    """Residual blocks per level of the encoder; the decoder has one more per level."""
    z_channels: Annotated[int, Between(1, 2**16)] = 256
    """Channels between the network and the codebook's own projection."""
    embed_dim: Annotated[int, Between(1, 2**16)] = 256
    """Width of a codebook vector."""
    codebook_size: Annotated[int, Between(2, 2**20)] = 8192
    """Number of image codes."""
    dropout: Annotated[float, Below(0, 1)] = 0.0
    """Dropout rate in the residual blocks."""
    quantizer: Annotated[str, OneOf("vq", "lfq", "ibq")] = "vq"
    """How latents become codes: ``vq`` (the nearest codebook vector), ``lfq`` (the signs of
    embed_dim dimensions; no codebook) or ``ibq`` (the codebook vector with the largest inner
    product, all of which learn in every step)."""

    @property
    def downsampling(self) -> int:
        """Pixels per code along each axis."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> int:
        """Codes per image along each axis."""
        return self.resolution // self.downsampling

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    def check(self, where: str) -> None:
        """Refuse a shape that cannot work.

        Args:
            where: The file or preset that errors name.

        Raises:
            ConfigError: For the first value that cannot work.
        """
        for problem in find_violations(self, "model"):
            raise ConfigError(f"{where}: {problem.where}", problem.what, problem.remedy)
        if not 1 <= len(self.ch_mult) <= MOST_LEVELS:
            raise ConfigError(
                f"{where}: model.ch_mult",
                f"{shown(list(self.ch_mult))} has {len(self.ch_mult)} levels, not 1 to "
                f"{MOST_LEVELS}",
                "Use one factor of 1 or more for each level",
            )
        if self.base_channels % NORM_GROUPS:
            raise ConfigError(
                f"{where}: model.base_channels",
                f"{self.base_channels} is not a multiple of {NORM_GROUPS}, the groups of GroupNorm",
                f"Use {-(-self.base_channels // NORM_GROUPS) * NORM_GROUPS}",
            )
        if self.quantizer == "lfq" and self.codebook_size != 2**self.embed_dim:
            bits = (self.codebook_size - 1).bit_length()
            raise ConfigError(
                f"{where}: model.codebook_size",
                f"{self.codebook_size} codes, but lfq has two for each of the {self.embed_dim} "
                "dimensions of model.embed_dim, all combined",
                f"Use model.embed_dim={bits} and model.codebook_size={2**bits}",
            )
        if self.resolution % self.downsampling:
            nearest = -(-self.resolution // self.downsampling) * self.downsampling
            raise ConfigError(
                f"{where}: model.resolution",
                f"{self.resolution} is not a multiple of {self.downsampling}, by which "
                f"{len(self.ch_mult)} levels shrink it",
                f"Use {nearest}, or fewer levels in model.ch_mult",
            )


def smallest_resolution(layers: int) -> int:
    """The smallest image of which ``layers`` halving layers of the discriminator leave a patch."""
    return 3 * 2**layers


def activation_bytes(model: VqganConfig) -> int:
    """Bytes that the residual blocks keep for the backward pass of one image, in fp32."""
    total = 0
    for level, factor in enumerate(model.ch_mult):
        pixels = (model.resolution >> level) ** 2
        blocks = 2 * model.num_res_blocks + 1  # those of the encoder, and one more in the decoder
        total += blocks * KEPT_PER_BLOCK * pixels * factor * model.base_channels * 4
    return total
