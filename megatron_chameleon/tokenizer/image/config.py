"""The config of an image tokenizer: the network's shape and how it is trained.

Presets are in ``presets/``; a YAML file and ``section.key=value`` words override them:

    chameleon tokenizer image photos/ --output DIR --config digits model.codebook_size=64
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_chameleon.config.constraints import (
    Below,
    Between,
    NonNegativeInt,
    OneOf,
    PathText,
    PositiveInt,
    Share,
    Text,
    find_violations,
)
from megatron_chameleon.config.load import load_dataclass
from megatron_chameleon.config.names import find_config
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.image.shape import VqganConfig, smallest_resolution
from megatron_chameleon.wording import cut

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "chameleon_512"

SMALLEST_FOR_PERCEPTUAL = {"lpips": 16, "spectral": 8, "wavelet": 2}
"""Pixels that VGG16's four halvings, the smallest window and one level of wavelets need."""

LossWeight = Annotated[float, Between(0, 1e6)]


@dataclass
class ImageTrainingConfig:
    """How the network is trained.

    The paper gives no values; the defaults follow Esser et al. 2021.
    """

    steps: PositiveInt = 1000
    """Updates of the network."""
    batch_size: Annotated[int, Between(1, 2**16)] = 8
    """Images per step."""
    lr: Annotated[float, Between(0, 10)] = 4.5e-6
    """Peak learning rate of Adam (betas 0.5 and 0.9), for the network and the discriminator."""
    lr_warmup_steps: NonNegativeInt = 0
    """The learning rate rises linearly over this many steps."""
    lr_final: Annotated[float, Between(0, 100)] = 1.0
    """Learning rate at the end as a share of the peak, along a cosine; 1 keeps it constant."""
    l1_weight: LossWeight = 1.0
    """Weight of the mean absolute error of pixels in [-1, 1]."""
    l2_weight: LossWeight = 0.0
    """Weight of their mean squared error."""
    perceptual: Annotated[str, OneOf("none", "auto", "lpips", "spectral", "wavelet")] = "none"
    """Perceptual loss: ``lpips`` (features of VGG16, whose weights ``perceptual_backbone`` names),
    or ``spectral`` (magnitudes of local spectra) or ``wavelet`` (Haar coefficients), which need no
    weights; ``auto``: lpips if a backbone is named, else wavelet."""
    perceptual_weight: LossWeight = 1.0
    """Weight of the perceptual loss."""
    perceptual_backbone: PathText = ""
    """File with the weights of torchvision's vgg16 (.pth or .safetensors), for ``lpips``."""
    codebook_weight: LossWeight = 1.0
    """Weight of the loss that moves codebook vectors to the latents."""
    commitment_beta: LossWeight = 0.25
    """Weight of the commitment loss."""
    codebook: Annotated[str, OneOf("loss", "ema")] = "loss"
    """What moves codebook vectors to the latents: the codebook loss, or moving averages of the
    latents (``ema``), which need no weight and no learning rate."""
    ema_decay: Share = 0.99
    """Share of the moving averages that a step keeps."""
    entropy_weight: LossWeight = 0.1
    """Weight of the entropy loss of ``lfq`` and ``ibq``, which keeps all codes in use."""
    reseed_every_steps: NonNegativeInt = 0
    """Move codebook vectors that were unused for this many steps to latents; 0 turns this off."""
    reseed_fraction: Share = 0.8
    """Share of the steps after which vectors are no longer moved, so that all of them settle."""
    discriminator_weight: LossWeight = 0.0
    """Weight of the adversarial loss, in addition to the adaptive weight; 0: no discriminator."""
    discriminator_start: NonNegativeInt = 0
    """Step from which the adversarial loss is added."""
    discriminator_channels: Annotated[int, Between(1, 4096)] = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: Annotated[int, Between(0, 10)] = 3
    """How often the resolution is halved before a patch is judged."""
    faces: Annotated[float, Between(1, 1000)] = 1.0
    """How much more often a picture with a face is sampled: 2 in the paper; 1 does not look for
    faces."""
    face_detector: Annotated[str, Text(200)] = "skimage"
    """What finds faces: ``skimage`` (extra [faces]), MODULE:FUNCTION, or the name of an entry point
    of the group ``megatron_chameleon.face_detectors``."""
    rotate_degrees: Annotated[float, Between(0, 180)] = 0.0
    """Augmentation: largest rotation in either direction."""
    shift: Share = 0.0
    """Augmentation: largest shift along each axis, as a share of the image."""
    scale: Annotated[float, Below(0, 1)] = 0.0
    """Augmentation: largest change of size, as a share; 0.1 draws scales from 0.9 to 1.1."""
    dtype: Annotated[str, OneOf("fp32", "bf16")] = "fp32"
    """fp32, or bf16 with fp32 weights and an fp32 search of the codebook."""
    holdout: Annotated[float, Below(0, 1)] = 0.01
    """Share of the images that is held out to be measured; their names alone decide which ones.
    0: none."""
    measure_every_steps: NonNegativeInt = 500
    """Steps between two measurements of the held-out images, which also update report.html; 0:
    only after the last step."""
    cache_gib: Annotated[float, Between(0, 1e6)] = 4.0
    """Memory for prepared images, for all processes of a machine together; images that do not fit
    are read again each time they are sampled."""
    log_every_steps: PositiveInt = 50
    """Steps between two progress lines."""
    save_minutes: Annotated[float, Between(0, 1e6)] = 5.0
    """Minutes between two saves; after a kill, the same command continues from the last one. 0: it
    saves only when it is asked to stop, and after its last step."""
    max_minutes: Annotated[float, Between(0, 1e6)] = 0.0
    """Minutes of training, including those before a kill, after which it stops and writes the
    tokenizer as it is then; 0: no limit."""

    @property
    def perceptual_kind(self) -> str:
        """The perceptual loss that is used."""
        if self.perceptual_weight == 0:
            return "none"
        if self.perceptual == "auto":
            return "lpips" if self.perceptual_backbone else "wavelet"
        return self.perceptual


LATER_KEYS: dict[str, object] = {
    "dtype": "fp32",
    "holdout": 0.0,
    "measure_every_steps": None,
    "perceptual": "none",
    "perceptual_weight": 1.0,
    "perceptual_backbone": None,
    "codebook": "loss",
    "ema_decay": 0.99,
    "entropy_weight": 0.1,
    "faces": 1.0,
    "face_detector": "skimage",
    "model.quantizer": "vq",
}
"""Keys of ``training`` that were added later, with the values that give the earlier behaviour.
image.json has them only if they differ from these, so that the same training has the same
fingerprint. None: never, because the key changes no weight, or is a path on one machine."""


def recorded(training: ImageTrainingConfig) -> dict[str, object]:
    """The part ``training`` of image.json."""
    return {
        key: value
        for key, value in asdict(training).items()
        if key not in LATER_KEYS or LATER_KEYS[key] not in (value, None)
    }


@dataclass
class ImageTokenizerConfig:
    model: VqganConfig = field(default_factory=VqganConfig)
    training: ImageTrainingConfig = field(default_factory=ImageTrainingConfig)


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
    path = find_config(name, PRESETS)
    config = load_dataclass(ImageTokenizerConfig, path, overrides)
    where = " ".join([str(name), *map(cut, overrides)])
    config.model.check(where)
    _check_training(config, where)
    return config


def _check_training(config: ImageTokenizerConfig, where: str) -> None:
    training = config.training
    for problem in find_violations(training, "training"):
        raise ConfigError(f"{where}: {problem.where}", problem.what, problem.remedy)
    if training.l1_weight == training.l2_weight == 0:
        raise ConfigError(
            f"{where}: training.l1_weight", "l1_weight and l2_weight are both 0", "Set one above 0"
        )
    _check_perceptual(config, where)
    if training.codebook == "ema" and config.model.quantizer != "vq":
        raise ConfigError(
            f"{where}: training.codebook",
            f"ema is for model.quantizer=vq, not {config.model.quantizer}",
            "Use training.codebook=loss",
        )
    smallest = smallest_resolution(training.discriminator_layers)
    if training.discriminator_weight > 0 and config.model.resolution < smallest:
        raise ConfigError(
            f"{where}: training.discriminator_layers",
            f"{training.discriminator_layers} layers need images of {smallest} pixels, "
            f"model.resolution is {config.model.resolution}",
            "Use fewer layers",
        )


def _check_perceptual(config: ImageTokenizerConfig, where: str) -> None:
    training, kind = config.training, config.training.perceptual_kind
    smallest = SMALLEST_FOR_PERCEPTUAL.get(kind, 1)
    if kind == "lpips" and not training.perceptual_backbone:
        raise ConfigError(
            f"{where}: training.perceptual",
            "lpips needs the weights of VGG16, and training.perceptual_backbone names no file",
            "Give the file of torchvision's vgg16 there, or use training.perceptual=wavelet, which "
            "needs none",
        )
    if config.model.resolution < smallest:
        raise ConfigError(
            f"{where}: training.perceptual",
            f"{kind} needs images of {smallest} pixels, model.resolution is "
            f"{config.model.resolution}",
            "Use another perceptual loss, or none",
        )
