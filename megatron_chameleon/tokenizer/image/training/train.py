"""Trains the image tokenizer (VQGAN) and writes it into a tokenizer folder.

    chameleon tokenizer image photos/ --output DIR --config digits training.steps=500

The state is saved every few minutes; after a kill the same command continues from it
(``unfinished.py``). With one process on a CPU, the result is bit for bit that of an uninterrupted
training.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_chameleon.announce import announced
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.files import make_folder, writing
from megatron_chameleon.outputs import save_anyhow
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig, recorded
from megatron_chameleon.tokenizer.image.faces.weights import (
    FACES_FILE,
    emphasise,
    find_faces,
    log_faces,
)
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.tokenizer import to_pixels
from megatron_chameleon.tokenizer.image.training.batches import ImageSet, write_dropped
from megatron_chameleon.tokenizer.image.training.holdout import hold_out
from megatron_chameleon.tokenizer.image.training.limits import (
    check_fits,
    describe_cost,
    needs_of,
)
from megatron_chameleon.tokenizer.image.training.processes import Processes
from megatron_chameleon.tokenizer.image.training.records.folder import RunFolder
from megatron_chameleon.tokenizer.image.training.trainer import Trainer
from megatron_chameleon.tokenizer.image.training.unfinished import (
    PARTIAL_FOLDER,
    Saver,
    UnfinishedTraining,
    identity_of,
)
from megatron_chameleon.tokenizer.image.training_image import TrainingImage
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.wording import counted

logger = logging.getLogger(__name__)

_OPENED = 256
"""At most this many pictures are opened to find enough readable ones to measure."""
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
    run: str | Path | None = None,
    command: str = "chameleon tokenizer image",
) -> ImageTrainingResult | None:
    """Train on images; write OUTPUT/image.safetensors, image.json and the list of dropped images.

    The same images, config and seed give the same weights on the same CPU, also after a kill. All
    processes of a job that has joined a process group call it, and share every batch.

    Args:
        entries: The images.
        config: Shape and training.
        output: The tokenizer folder; an older image tokenizer in it is replaced.
        seed: For the first weights, the draws and the augmentation.
        device: Where to compute.
        report: Called with each progress line.
        stop: Asked before each step whether to save and stop.
        restart: Start over, and discard an unfinished training.
        run: The folder for metrics.jsonl and report.html; None: they are not written.
        command: What the page names as its origin.

    Returns:
        The result; None if it was asked to stop.

    Raises:
        ConfigError: If the config does not suit the vocabulary, the machine or what is unfinished.
        TrainingError: If a loss or weight is not finite. The older tokenizer of the folder remains.
        DataError: If no image can be read, or the folder cannot be written.
    """
    processes = Processes.of_job()
    output, device = make_folder(output), torch.device(device)
    _check_vocabulary(output, config.model.codebook_size)
    processes.check_batch(config.training.batch_size)
    check_fits(config, device, processes.size)
    report = report if processes.is_first else _say_nothing
    entries = _with_faces(entries, config, output / PARTIAL_FOLDER, restart, processes)
    images, folder = _open(entries, config, seed, processes, run, command)
    # fork_rng leaves the state of the caller's random generators unchanged
    devices = [device] if device.type == "cuda" else []
    with UnfinishedTraining(output, processes) as unfinished, torch.random.fork_rng(devices):
        if restart:
            unfinished.discard()
        torch.manual_seed(seed)
        trainer = Trainer(config, seed, device, processes)
        saver = Saver(trainer, images, unfinished, identity_of(config, seed, images))
        saver.resume(report)
        result = _train(trainer, images, saver, report, stop, folder)
        if result is not None:
            _finish(output, trainer, images, result, folder)
            unfinished.remove()
    return result


def _finish(
    output: Path,
    trainer: Trainer,
    images: ImageSet,
    result: ImageTrainingResult,
    folder: RunFolder | None,
) -> None:
    write = partial(_write, trainer=trainer, images=images, result=result, run=folder)
    trainer.processes.on_first(lambda: save_anyhow(write, output))


def _open(
    entries: Sequence[TrainingImage],
    config: ImageTokenizerConfig,
    seed: int,
    processes: Processes,
    run: str | Path | None,
    command: str,
) -> tuple[ImageSet, RunFolder | None]:
    """The images to train on, and on the first process the run folder with those to measure."""
    training, resolution = config.training, config.model.resolution
    kept, held_out = hold_out(entries, training.holdout)
    needs = needs_of(config, processes.size)
    if processes.is_first:
        logger.info(describe_cost(config, needs, len(kept), len(held_out), processes.size))
    with announced(f"opening {counted(len(kept), 'image')}"):
        cache_bytes = int(training.cache_gib * 2**30) // processes.size
        images = ImageSet(kept, resolution, cache_bytes, processes)
    if run is None or not processes.is_first:
        return images, None
    measured = [ImageSet(part[:_OPENED], resolution, 0) for part in (held_out, kept)]
    return images, RunFolder(Path(run), config, seed, images, measured, command)


def _say_nothing(line: str) -> None:
    """In place of ``report``: the first process speaks for all."""


def _write(
    folder: Path,
    trainer: Trainer,
    images: ImageSet,
    result: ImageTrainingResult,
    run: RunFolder | None,
) -> None:
    write_dropped(run.dropped() if run is not None else images.dropped_reasons(), folder)
    training = recorded(trainer.config)
    details = {"training": training, "seed": trainer.seed, "result": asdict(result)}
    save_vqgan(trainer.model, folder, details)


def _train(
    trainer: Trainer,
    images: ImageSet,
    saver: Saver,
    report: Callable[[str], None],
    stop: StopRequest | None,
    folder: RunFolder | None,
) -> ImageTrainingResult | None:
    try:
        with stop or nullcontext(lambda: None) as asked:
            if not trainer.fit(images, report, saver, asked, folder):
                return None
    except TrainingError:
        saver.unfinished.discard()  # it would end there again; with other values it is another one
        raise
    with announced("measuring the reconstruction"):
        trainer.measure(folder)
        result = trainer.processes.on_first(
            lambda: measure_reconstruction(trainer.model, images, trainer.config.batch_size)
        )
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
    entries: Sequence[TrainingImage],
    config: ImageTokenizerConfig,
    partial_folder: Path,
    restart: bool,
    processes: Processes,
) -> Sequence[TrainingImage]:
    """The images; those with faces have a higher weight if the config says so."""
    if config.training.faces == 1:
        return entries

    def look() -> dict[str, int]:
        if restart:
            with writing(partial_folder):
                (partial_folder / FACES_FILE).unlink(missing_ok=True)
        found = find_faces(entries, config.training.face_detector, partial_folder)
        log_faces(entries, found, config.training.faces)
        return found

    return emphasise(entries, processes.on_first(look), config.training.faces)


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
