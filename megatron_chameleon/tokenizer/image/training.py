"""Trains the image tokenizer (VQGAN) and writes it into a tokenizer folder.

    chameleon tokenizer image photos/ --output DIR --config digits training.steps=500

The loss is pixels + codebook + commitment, and from ``discriminator_start`` on also the adversarial
loss of a patch discriminator. The perceptual loss (LPIPS) of Esser et al. 2021 is left out, because
its pretrained weights would have to be downloaded.

The state is saved every few minutes; after a kill the same command goes on from it
(``unfinished.py``). On one CPU process the result is that of an unbroken training, bit for bit.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.announce import announced
from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.files import make_folder
from megatron_chameleon.outputs import save_anyhow
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.image.batches import ImageSet, TrainingImage, training_batch
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig, ImageTrainingConfig
from megatron_chameleon.tokenizer.image.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
)
from megatron_chameleon.tokenizer.image.limits import FiniteLosses, check_memory, check_weights
from megatron_chameleon.tokenizer.image.progress import Progress, TrainingClock
from megatron_chameleon.tokenizer.image.tokenizer import save_vqgan, to_pixels
from megatron_chameleon.tokenizer.image.unfinished import Saver, UnfinishedTraining, identity_of
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganOutput
from megatron_chameleon.wording import counted, format_duration

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.9)
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
    with announced(f"opening {counted(len(entries), 'image')}"):
        images = ImageSet(entries, config.model.resolution, int(config.training.cache_gib * 2**30))
    # fork_rng leaves the state of the caller's random generators unchanged
    devices = [device] if device.type == "cuda" else []
    with UnfinishedTraining(output) as unfinished, torch.random.fork_rng(devices=devices):
        if restart:
            unfinished.discard()
        torch.manual_seed(seed)
        trainer = _Trainer(config, seed, device)
        saver = Saver(trainer, images, unfinished, identity_of(config, seed, images))
        saver.resume(report)
        result = _train(trainer, images, saver, report, stop or nullcontext(lambda: None))
        if result is not None:
            save_anyhow(lambda folder: _write(folder, trainer, images, result), output)
            unfinished.remove()
    return result


def _write(
    folder: Path, trainer: "_Trainer", images: ImageSet, result: ImageTrainingResult
) -> None:
    training, seed = asdict(trainer.config), trainer.seed
    images.write_dropped(folder)
    details = {"training": training, "seed": seed, "result": asdict(result)}
    save_vqgan(trainer.model, folder, details)


def _train(
    trainer: "_Trainer",
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


class _Trainer:
    """The network, the discriminator, their optimizers, and a training step."""

    def __init__(self, config: ImageTokenizerConfig, seed: int, device: torch.device) -> None:
        self.config = config.training
        self.seed = seed
        self.device = device
        self.model = Vqgan(config.model).to(device).train()
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.config.lr, betas=ADAM_BETAS
        )
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_optimizer: torch.optim.Adam | None = None
        if self.config.discriminator_weight > 0:
            self.discriminator = PatchDiscriminator(
                config.model.in_channels,
                self.config.discriminator_channels,
                self.config.discriminator_layers,
            ).to(device)
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=self.config.lr, betas=ADAM_BETAS
            )
        self.uses_K = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=device)
        """How often each code has been chosen since the last reseeding."""
        self.finite = FiniteLosses(device)
        self.done = 0
        """Steps that were done, those of earlier starts included."""
        self.clock = TrainingClock(self.config)
        self.used_codes: Tensor | None = None
        """Codes that were used since the last progress line of an earlier start."""

    def fit(
        self,
        images: ImageSet,
        report: Callable[[str], None],
        saver: Saver,
        asked: Callable[[], str | None],
    ) -> bool:
        """Train all steps, with a progress line every ``log_every_steps``.

        Returns:
            Whether it is over: all steps are done, or the time is. False: it was asked to stop.
        """
        config, clock = self.config, self.clock
        if self.done == 0:
            self.start_codebook(images)
        progress = Progress(config, report, clock, self.done)
        progress.used = self.used_codes
        while True:
            signal = asked()
            is_over = self.done >= config.steps or (self.done > 0 and clock.left() <= 0)
            self.used_codes = progress.used
            if is_over:
                self.finite.check()
                check_weights(self.model, self.done)
            if signal or is_over or clock.is_save_due():
                saver.save(must=bool(signal))
            if signal:
                place = f"step {self.done:,} of {config.steps:,}"
                report(f"{signal}: saved at {place}; the same command goes on from there")
                return False
            if is_over:
                break
            self.train_step(images, progress)
        if self.done < config.steps:
            report(
                f"stopped by training.max_minutes={config.max_minutes:g} after "
                f"{format_duration(clock.total())}, at step {self.done:,} of {config.steps:,}: "
                "the tokenizer is what it has learnt by then"
            )
        return True

    def train_step(self, images: ImageSet, progress: Progress) -> None:
        """Do the next step, and what follows it."""
        config, step = self.config, self.done
        self.set_learning_rate(step)
        pixels_BCHW = training_batch(images, config, self.seed, step).to(self.device)
        losses, output = self.step(pixels_BCHW, step)
        self.finite.note(losses, step)
        if self.device.type == "cpu" or (step + 1) % config.log_every_steps == 0:
            self.finite.check()  # on a GPU, this waits for the step
        self.uses_K += output.codes_BN.flatten().bincount(minlength=len(self.uses_K))
        progress.step(step, losses, output.codes_BN, len(images.dropped))
        every = config.reseed_every_steps
        if every and (step + 1) % every == 0 and step + 1 <= config.reseed_fraction * config.steps:
            self.reseed(output.latents_BDhw.detach(), step)
        self.done += 1

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and the time that was spent."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            **parts,
            "uses": self.uses_K,
            "done": self.done,
            "seconds": self.clock.total(),
            "used_codes": self.used_codes,
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.uses_K.copy_(state["uses"])
        self.done = int(state["done"])
        self.clock = TrainingClock(self.config, float(state["seconds"]))
        used = state["used_codes"]
        self.used_codes = None if used is None else used.to(self.device)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _parts(self) -> dict[str, Any]:
        """What has weights or averages."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator
            parts["discriminator_optimizer"] = self.discriminator_optimizer
        return parts

    @torch.no_grad()
    def start_codebook(self, images: ImageSet) -> None:
        """Set the codebook to the first latents: vectors far from them would never be chosen."""
        weight_KD = self.model.quantize.embedding.weight
        vectors: list[Tensor] = []
        rng = np.random.default_rng([self.seed, self.config.steps])  # a stream of its own
        batches = -(-len(weight_KD) // (self.config.batch_size * self.model.config.codes_per_image))
        for _ in range(batches):
            pixels_BCHW = to_pixels(images.draw(self.config.batch_size, rng)).to(self.device)
            vectors.append(_latent_rows(self.model.latents(pixels_BCHW)))
        rows_MD = torch.cat(vectors)
        weight_KD.copy_(rows_MD[torch.tensor(rng.permutation(len(rows_MD))[: len(weight_KD)])])

    def set_learning_rate(self, step: int) -> None:
        lr = self.config.lr * learning_rate_share(self.config, step)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = lr

    def step(self, pixels_BCHW: Tensor, step: int) -> tuple[dict[str, Tensor], VqganOutput]:
        """Update the network, then the discriminator if it is active at this step."""
        config = self.config
        output = self.model(pixels_BCHW)
        reconstruction_BCHW = output.reconstruction_BCHW
        l1 = functional.l1_loss(reconstruction_BCHW, pixels_BCHW)
        pixel_loss = config.l1_weight * l1
        if config.l2_weight > 0:
            l2 = functional.mse_loss(reconstruction_BCHW, pixels_BCHW)
            pixel_loss = pixel_loss + config.l2_weight * l2
        loss = (
            pixel_loss
            + config.codebook_weight * output.codebook_loss
            + config.commitment_beta * output.commitment_loss
        )
        losses = {"l1": l1, "codebook": output.codebook_loss, "commit": output.commitment_loss}
        adversarial = self.discriminator is not None and step >= config.discriminator_start
        if adversarial:
            assert self.discriminator is not None
            losses["gan"] = -self.discriminator(reconstruction_BCHW).mean()
            last_layer = self.model.decoder.conv_out.weight
            balance = adaptive_weight(pixel_loss, losses["gan"], last_layer)
            loss = loss + config.discriminator_weight * balance * losses["gan"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if adversarial:
            losses["disc"] = self.discriminator_step(pixels_BCHW, reconstruction_BCHW.detach())
        return {name: value.detach() for name, value in losses.items()}, output

    def discriminator_step(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        # The network's backward pass has left gradients in the discriminator too.
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss = hinge_loss(self.discriminator(real_BCHW), self.discriminator(fake_BCHW))
        loss.backward()
        self.discriminator_optimizer.step()
        return loss

    @torch.no_grad()
    def reseed(self, latents_BDhw: Tensor, step: int) -> None:
        """Move unused codebook vectors to latents of the batch, and reset their Adam state."""
        unused = (self.uses_K == 0).nonzero().flatten()
        self.uses_K.zero_()
        rows_MD = _latent_rows(latents_BDhw)
        unused = unused[: len(rows_MD)]
        rng = np.random.default_rng([self.seed, step, 1])  # a stream of its own
        chosen = torch.tensor(rng.permutation(len(rows_MD))[: len(unused)], device=self.device)
        weight_KD = self.model.quantize.embedding.weight
        weight_KD[unused] = rows_MD[chosen]
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[weight_KD][name][unused] = 0


def learning_rate_share(config: ImageTrainingConfig, step: int) -> float:
    """Learning rate of a step over the peak: linear warm-up, then a cosine to ``lr_final``."""
    warmup = config.lr_warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    position = (step - warmup) / max(1, config.steps - warmup)
    return config.lr_final + (1 - config.lr_final) * 0.5 * (1 + float(np.cos(np.pi * position)))


def _latent_rows(latents_BDhw: Tensor) -> Tensor:
    """Latent vectors as rows: [B * N, D]."""
    return latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)


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
