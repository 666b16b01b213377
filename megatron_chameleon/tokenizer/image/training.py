"""Trains the image tokenizer (VQGAN) and writes it into a tokenizer folder.

    chameleon tokenizer image photos/ --output DIR --config digits training.steps=500

The loss is pixels + codebook + commitment, and from ``discriminator_start`` on also the adversarial
loss of a patch discriminator. The perceptual loss (LPIPS) of Esser et al. 2021 is left out, because
its pretrained weights would have to be downloaded.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.announce import announced
from megatron_chameleon.errors import ConfigError
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
from megatron_chameleon.tokenizer.image.tokenizer import save_vqgan, to_pixels
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganOutput
from megatron_chameleon.wording import counted, format_duration

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.9)
FIRST_STEPS, LONG_SECONDS = 3, 3600.0
"""After so many steps, a training that will take longer than this says so."""
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


def train_image_tokenizer(
    entries: Sequence[TrainingImage],
    config: ImageTokenizerConfig,
    output: str | Path,
    *,
    seed: int = 1,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = logger.info,
) -> ImageTrainingResult:
    """Train on images; write OUTPUT/image.safetensors, image.json and the list of dropped images.

    On the same CPU, the same images, config and seed give the same weights.

    Args:
        entries: The images.
        config: Shape and training.
        output: The tokenizer folder; an older image tokenizer in it is replaced.
        seed: For the first weights, the draws and the augmentation.
        device: Where to compute.
        report: Called with each progress line.

    Raises:
        ConfigError: If the folder's vocabulary has a different number of image codes, or the
            training cannot fit into memory.
        TrainingError: If a loss or weight is not finite. The folder is left as it was.
        DataError: If no image can be read, or the folder cannot be written. If it cannot take the
            result, the error names another folder that has it.
    """
    output, device = make_folder(output), torch.device(device)
    _check_vocabulary(output, config.model.codebook_size)
    check_memory(config, device)
    with announced(f"opening {counted(len(entries), 'image')}"):
        images = ImageSet(entries, config.model.resolution, int(config.training.cache_gib * 2**30))
    # fork_rng leaves the state of the caller's random generators unchanged
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        trainer = _Trainer(config, seed, device)
        trainer.fit(images, report)
        with announced("measuring the reconstruction"):
            result = measure_reconstruction(trainer.model, images, config.training.batch_size)
    details = {"training": asdict(config.training), "seed": seed, "result": asdict(result)}

    def save(folder: Path) -> None:
        images.write_dropped(folder)
        save_vqgan(trainer.model, folder, details)

    save_anyhow(save, output)
    return result


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

    def fit(self, images: ImageSet, report: Callable[[str], None]) -> None:
        """Train all steps, with a progress line every ``log_every_steps``."""
        config = self.config
        self.start_codebook(images)
        progress = _Progress(config, report)
        for step in range(config.steps):
            self.set_learning_rate(step)
            pixels_BCHW = training_batch(images, config, self.seed, step).to(self.device)
            losses, output = self.step(pixels_BCHW, step)
            self.finite.note(losses, step)
            if self.device.type == "cpu" or (step + 1) % config.log_every_steps == 0:
                self.finite.check()  # on a GPU, this waits for the step
            self.uses_K += output.codes_BN.flatten().bincount(minlength=len(self.uses_K))
            progress.step(step, losses, output.codes_BN, len(images.dropped))
            every = config.reseed_every_steps
            if (
                every
                and (step + 1) % every == 0
                and step + 1 <= config.reseed_fraction * config.steps
            ):
                self.reseed(output.latents_BDhw.detach(), step)
        self.finite.check()
        check_weights(self.model, config.steps)

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


class _Progress:
    """A line every ``log_every_steps``: losses, codebook use, speed and remaining time."""

    def __init__(self, config: ImageTrainingConfig, report: Callable[[str], None]) -> None:
        self.config = config
        self.report = report
        self.start_seconds = time.perf_counter()
        self.used: Tensor | None = None

    def step(self, step: int, losses: dict[str, Tensor], codes_BN: Tensor, dropped: int) -> None:
        seen = codes_BN.unique()
        self.used = seen if self.used is None else torch.cat([self.used, seen])
        done = step + 1
        seconds = time.perf_counter() - self.start_seconds
        total = seconds / done * self.config.steps
        if done == FIRST_STEPS and total > LONG_SECONDS:
            what = f"{self.config.steps:,} steps will take about {format_duration(total)} here"
            self.report(f"{what}; it saves at its end. training.steps=N makes it shorter")
        if done % self.config.log_every_steps and done != self.config.steps:
            return
        values = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
        line = (
            f"step {done}/{self.config.steps} {values} codes {self.used.unique().numel()} "
            f"{done * self.config.batch_size / seconds:.0f} images/s "
            f"ETA {format_duration(seconds / done * (self.config.steps - done))}"
        )
        self.report(f"{line} dropped {dropped}" if dropped else line)
        self.used = None


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
