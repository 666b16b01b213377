"""The config of an image tokenizer: the network's shape and how it is trained.

Presets are in ``presets/``; a YAML file and ``section.key=value`` words override them:

    chameleon tokenizer image photos/ --output DIR --config digits model.codebook_size=64
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.config.load import load_dataclass
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.image.discriminator import smallest_resolution
from megatron_chameleon.tokenizer.image.vqgan import VqganConfig

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "chameleon_512"


@dataclass
class ImageTrainingConfig:
    """How the network is trained.

    The paper gives no values; the defaults follow Esser et al. 2021.
    """

    steps: int = 1000
    batch_size: int = 8
    """Images per step."""
    lr: float = 4.5e-6
    """Peak learning rate of Adam (betas 0.5 and 0.9), for the network and the discriminator."""
    lr_warmup_steps: int = 0
    lr_final: float = 1.0
    """Learning rate at the end as a share of the peak, along a cosine; 1 keeps it constant."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error of pixels in [-1, 1]."""
    l2_weight: float = 0.0
    """Weight of their mean squared error."""
    codebook_weight: float = 1.0
    commitment_beta: float = 0.25
    """Weight of the commitment loss."""
    reseed_every_steps: int = 0
    """Move codebook vectors that were unused for this many steps to latents; 0 turns this off."""
    reseed_fraction: float = 0.8
    """Share of the steps after which vectors are no longer moved, so that all of them settle."""
    discriminator_weight: float = 0.0
    """Weight of the adversarial loss, in addition to the adaptive weight; 0: no discriminator."""
    discriminator_start: int = 0
    """Step from which the adversarial loss is added."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    """How often the resolution is halved before a patch is judged."""
    rotate_degrees: float = 0.0
    """Augmentation: largest rotation in either direction."""
    shift: float = 0.0
    """Augmentation: largest shift along each axis, as a share of the image."""
    scale: float = 0.0
    """Augmentation: largest change of size, as a share; 0.1 draws scales from 0.9 to 1.1."""
    cache_gib: float = 4.0
    """Memory for prepared images; images that do not fit are read again whenever they are drawn."""
    log_every_steps: int = 50


@dataclass
class ImageTokenizerConfig:
    model: VqganConfig = field(default_factory=VqganConfig)
    training: ImageTrainingConfig = field(default_factory=ImageTrainingConfig)


def preset_names() -> list[str]:
    """The names that ``--config`` takes in place of a file."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_image_config(
    name: str | Path = DEFAULT_PRESET, overrides: Sequence[str] = ()
) -> ImageTokenizerConfig:
    """Read a preset or a YAML file, apply overrides and check the result.

    Args:
        name: Name of a preset, or path of a YAML file.
        overrides: Words ``section.key=value``.

    Raises:
        ConfigError: If there is no such config, a key is unknown, or values are invalid or
            contradict each other.
    """
    config = load_dataclass(ImageTokenizerConfig, _config_path(name), overrides)
    where = " ".join([str(name), *overrides])
    config.model.check(where)
    _check_training(config, where)
    return config


def _config_path(name: str | Path) -> Path:
    preset = PRESETS / f"{name}.yaml"
    if str(name) in preset_names():
        return preset
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--config {name}",
            "is neither a preset nor a file",
            f"Use one of {', '.join(preset_names())}, or a YAML file",
        )
    return path


def _check_training(config: ImageTokenizerConfig, where: str) -> None:
    training = config.training
    for item in dataclasses.fields(training):
        value = getattr(training, item.name)
        least = 1 if item.name in ("steps", "batch_size", "log_every_steps") else 0
        if value < least:
            raise ConfigError(
                f"{where}: training.{item.name}",
                f"{value} is below {least}",
                f"Use {least} or more",
            )
    if training.l1_weight == training.l2_weight == 0:
        raise ConfigError(
            f"{where}: training.l1_weight", "l1_weight and l2_weight are both 0", "Set one above 0"
        )
    if not training.scale < 1:
        raise ConfigError(f"{where}: training.scale", f"{training.scale} is not below 1", "Use 0.1")
    smallest = smallest_resolution(training.discriminator_layers)
    if training.discriminator_weight > 0 and config.model.resolution < smallest:
        raise ConfigError(
            f"{where}: training.discriminator_layers",
            f"{training.discriminator_layers} layers need images of {smallest} pixels, "
            f"model.resolution is {config.model.resolution}",
            "Use fewer layers",
        )
