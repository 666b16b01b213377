"""The config of the image tokenizer: ``image.yaml``."""

from dataclasses import dataclass

from megatron_chameleon.config.explanations import explanations
from megatron_chameleon.starter.writing.yaml_text import Entry, section
from megatron_chameleon.tokenizer.image.config import ImageTrainingConfig
from megatron_chameleon.tokenizer.image.shape import VqganConfig

LOG_SECONDS = 10.0


@dataclass(frozen=True)
class ImageShape:
    """Size of pictures and of the network that turns them into codes."""

    resolution: int
    ch_mult: tuple[int, ...]
    codebook_size: int
    base_channels: int = 32
    channels: int = 32
    """z_channels and embed_dim."""
    res_blocks: int = 1
    batch_size: int = 16

    @property
    def codes(self) -> int:
        """Codes per picture."""
        return (self.resolution >> (len(self.ch_mult) - 1)) ** 2


def vqgan_config(shape: ImageShape) -> VqganConfig:
    """The network of a shape."""
    return VqganConfig(
        resolution=shape.resolution,
        base_channels=shape.base_channels,
        ch_mult=list(shape.ch_mult),
        num_res_blocks=shape.res_blocks,
        z_channels=shape.channels,
        embed_dim=shape.channels,
        codebook_size=shape.codebook_size,
    )


def image_training(shape: ImageShape, steps: int, step_seconds: float | None) -> dict[str, object]:
    """How the network is trained. A narrow one has few steps, in which it must find the colours.

    The mean absolute error alone begins with the median of the pixels, which is grey or brown where
    a picture has a small coloured thing on a light ground; the squared error brings its colour.
    """
    wide = shape.base_channels > 32
    every = max(round(LOG_SECONDS / step_seconds), 1) if step_seconds else 50
    squared = {} if wide else {"l2_weight": 2.0}
    return {
        "steps": steps,
        "batch_size": shape.batch_size,
        "lr": 3e-4 if wide else 1e-3,
        **squared,
        "lr_warmup_steps": max(min(50, steps // 10), 1),
        "lr_final": 0.02,
        "reseed_every_steps": 50,
        "reseed_fraction": 0.6,
        "log_every_steps": min(every, max(steps // 4, 1)),
    }


def image_yaml(shape: ImageShape, training: dict[str, object], side: int) -> str:
    """The text of ``image.yaml``."""
    why = {
        "resolution": f"your pictures have a shorter side of {side} pixels (median); "
        f"each becomes {shape.codes} codes",
        "codebook_size": "as many as --image-codes of the text tokenizer",
        "steps": "fits the time that `chameleon init` measured",
        "l2_weight": "keeps the colours, which the absolute error alone finds late",
    }
    config = vqgan_config(shape)
    meanings = explanations(VqganConfig)
    names = ("resolution", "base_channels", "ch_mult", "num_res_blocks", "z_channels")
    model = [
        Entry(name, getattr(config, name), meanings.get(name, ""), why.get(name, ""))
        for name in (*names, "embed_dim", "codebook_size")
    ]
    meanings = explanations(ImageTrainingConfig)
    rest = [
        Entry(name, value, meanings.get(name, ""), why.get(name, ""))
        for name, value in training.items()
    ]
    head = (
        "# The image tokenizer, which turns pictures into codes and back. Written by\n"
        "# `chameleon init`; docs/data.md says more.\n"
    )
    return head + section("model", model) + section("training", rest)
