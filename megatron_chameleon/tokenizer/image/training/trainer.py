"""The state and the step of an image tokenizer's training.

The loss is pixels + codebook + commitment, and from ``discriminator_start`` on also the adversarial
loss of a patch discriminator. The perceptual loss (LPIPS) of Esser et al. 2021 is left out, because
its pretrained weights would have to be downloaded.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig, ImageTrainingConfig
from megatron_chameleon.tokenizer.image.tokenizer import to_pixels
from megatron_chameleon.tokenizer.image.training.batches import ImageSet, training_batch
from megatron_chameleon.tokenizer.image.training.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
)
from megatron_chameleon.tokenizer.image.training.limits import FiniteLosses, check_weights
from megatron_chameleon.tokenizer.image.training.progress import Progress, TrainingClock
from megatron_chameleon.tokenizer.image.training.unfinished import Saver
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganOutput
from megatron_chameleon.wording import format_duration

ADAM_BETAS = (0.5, 0.9)


class Trainer:
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
