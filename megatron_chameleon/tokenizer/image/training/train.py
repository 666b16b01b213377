"""Trains the image tokenizer (VQGAN) and writes it into a tokenizer folder.

    chameleon tokenizer image photos/ --output DIR --config digits training.steps=500

The state is saved every few minutes; after a kill the same command goes on from it
(``unfinished.py``). On one CPU process the result is that of an unbroken training, bit for bit.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_chameleon.announce import announced
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.files import make_folder, writing
from megatron_chameleon.outputs import save_anyhow
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from megatron_chameleon.tokenizer.image.faces.weights import FACES_FILE, emphasise, find_faces
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.tokenizer import to_pixels
from megatron_chameleon.tokenizer.image.training.batches import (
    ImageSet,
    TrainingImage,
)
from megatron_chameleon.tokenizer.image.training.limits import (
    check_memory,
)
from megatron_chameleon.tokenizer.image.training.trainer import Trainer
from megatron_chameleon.tokenizer.image.training.unfinished import (
    PARTIAL_FOLDER,
    Saver,
    UnfinishedTraining,
    identity_of,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.wording import counted

logger = logging.getLogger(__name__)

MEASURED_IMAGES = 1024
"""The closing figures are measured on at most this many training images."""


@dataclass(frozen=True)
class ImageTrainingResult:
    """The result, measured on training images without augmentation."""

    images: int
    """Images that could be used."""
    dropped: int
    psnr: float
    """Peak signal-to-noise ratio of the reconstruction, dB."""
    codes_used: int
    """Codebook vectors that are used by at least one measured image."""
    codebook_size: int
    steps: int = 0
    """Updates of the network."""


StopRequest = AbstractContextManager[Callable[[], str | None]]
"""Entered while the training can be saved. What it gives returns the name of the signal that asks
to save and stop, or None."""


def train_image_tokenizer(
    entries: Sequence[TrainingImage],
    config: ImageTokenizerConfig,
    output: str | Path,
    *,
    seed: int = 1,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = logger.info,
    stop: StopRequest | None = None,
    restart: bool = False,
) -> ImageTrainingResult | None:
    """Train on images; write OUTPUT/image.safetensors, image.json and the list of dropped images.

    On the same CPU, the same images, config and seed give the same weights. An unfinished training
    of them in the folder is continued.

    Args:
        entries: The images.
        config: Shape and training.
        output: The tokenizer folder; an older image tokenizer in it is replaced.
        seed: For the first weights, the draws and the augmentation.
        device: Where to compute.
        report: Called with each progress line.
        stop: Asked before each step whether to save and stop.
        restart: Begin anew, and discard an unfinished training.

    Returns:
        The result; None if it was asked to stop.

    Raises:
        ConfigError: If the folder's vocabulary has a different number of image codes, the training
            cannot fit into memory, or an unfinished training of something else is in the folder.
        TrainingError: If a loss or weight is not finite. The older tokenizer of the folder remains.
        DataError: If no image can be read, or the folder cannot be written. If it cannot take the
            result, the error names another folder that has it.
    """
    output, device = make_folder(output), torch.device(device)
    _check_vocabulary(output, config.model.codebook_size)
    check_memory(config, device)
    entries = _with_faces(entries, config, output / PARTIAL_FOLDER, restart)
    with announced(f"opening {counted(len(entries), 'image')}"):
        images = ImageSet(entries, config.model.resolution, int(config.training.cache_gib * 2**30))
    # fork_rng leaves the state of the caller's random generators unchanged
    devices = [device] if device.type == "cuda" else []
    with UnfinishedTraining(output) as unfinished, torch.random.fork_rng(devices=devices):
        if restart:
            unfinished.discard()
        torch.manual_seed(seed)
        trainer = Trainer(config, seed, device)
        saver = Saver(trainer, images, unfinished, identity_of(config, seed, images))
        saver.resume(report)
        result = _train(trainer, images, saver, report, stop or nullcontext(lambda: None))
        if result is not None:
            save_anyhow(lambda folder: _write(folder, trainer, images, result), output)
            unfinished.remove()
    return result


def _write(folder: Path, trainer: Trainer, images: ImageSet, result: ImageTrainingResult) -> None:
    training, seed = asdict(trainer.config), trainer.seed
    images.write_dropped(folder)
    details = {"training": training, "seed": seed, "result": asdict(result)}
    save_vqgan(trainer.model, folder, details)


def _train(
    trainer: Trainer,
    images: ImageSet,
    saver: Saver,
    report: Callable[[str], None],
    stop: StopRequest,
) -> ImageTrainingResult | None:
    try:
        with stop as asked:
            if not trainer.fit(images, report, saver, asked):
                return None
    except TrainingError:
        saver.unfinished.discard()  # it would end there again; with other values it is another one
        raise
    with announced("measuring the reconstruction"):
        result = measure_reconstruction(trainer.model, images, trainer.config.batch_size)
    return replace(result, steps=trainer.done)


@torch.inference_mode()
def measure_reconstruction(model: Vqgan, images: ImageSet, batch_size: int) -> ImageTrainingResult:
    """Measure reconstruction quality and codebook use on the first images of the set."""
    model.eval()
    device = next(model.parameters()).device
    pixels_NCHW = to_pixels(images.first(MEASURED_IMAGES))
    used = torch.zeros(model.config.codebook_size, dtype=torch.bool, device=device)
    squared_error = 0.0
    for batch_BCHW in pixels_NCHW.split(batch_size):
        batch_BCHW = batch_BCHW.to(device)
        codes_BN = model.encode(batch_BCHW)
        used[codes_BN.flatten()] = True
        missed_BCHW = model.decode(codes_BN).clamp(-1, 1) - batch_BCHW
        squared_error += missed_BCHW.double().square().sum().item()
    mean = squared_error / pixels_NCHW.numel()
    return ImageTrainingResult(
        images=len(images.entries) - len(images.dropped),
        dropped=len(images.dropped),
        psnr=10 * float(np.log10(4 / max(mean, 1e-12))),  # pixels span 2, so the peak power is 4
        codes_used=int(used.sum()),
        codebook_size=model.config.codebook_size,
    )


def _with_faces(
    entries: Sequence[TrainingImage], config: ImageTokenizerConfig, partial: Path, restart: bool
) -> Sequence[TrainingImage]:
    """The images; those with faces have a higher weight if the config says so."""
    if config.training.faces == 1:
        return entries
    if restart:
        with writing(partial):
            (partial / FACES_FILE).unlink(missing_ok=True)
    faces = find_faces(entries, config.training.face_detector, partial)
    return emphasise(entries, faces, config.training.faces)


def _check_vocabulary(output: Path, codebook_size: int) -> None:
    if not (output / VOCABULARY_FILE).exists():
        return
    image_codes = Vocabulary.load(output).image_codes
    if image_codes != codebook_size:
        raise ConfigError(
            "model.codebook_size",
            f"{codebook_size} codes, but {output / VOCABULARY_FILE} has {image_codes}",
            f"Use model.codebook_size={image_codes}, or another --output",
        )
