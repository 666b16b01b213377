"""The state and the step of an image tokenizer's training.

The loss is pixels + perceptual loss (if there is one) + codebook + commitment, and from
``discriminator_start`` on also the adversarial loss of a patch discriminator (Esser et al. 2021).
"""

import signal as signals
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig, ImageTrainingConfig
from megatron_chameleon.tokenizer.image.losses.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
)
from megatron_chameleon.tokenizer.image.losses.perceptual import perceptual_loss
from megatron_chameleon.tokenizer.image.quantizers.ema import MovingAverages
from megatron_chameleon.tokenizer.image.tokenizer import to_pixels
from megatron_chameleon.tokenizer.image.training.batches import ImageSet, training_batch
from megatron_chameleon.tokenizer.image.training.limits import FiniteLosses, check_weights
from megatron_chameleon.tokenizer.image.training.processes import Processes
from megatron_chameleon.tokenizer.image.training.progress import Progress, TrainingClock
from megatron_chameleon.tokenizer.image.training.records.folder import RunFolder
from megatron_chameleon.tokenizer.image.training.unfinished import Saver
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganOutput
from megatron_chameleon.wording import format_duration

ADAM_BETAS = (0.5, 0.9)


class Trainer:
    """The network, the discriminator, their optimizers, and a training step.

    Args:
        config: Shape and training.
        seed: For the draws; the weights are those of torch's generator.
        device: Where to compute.
        processes: Those that share each batch.
    """

    def __init__(
        self,
        config: ImageTokenizerConfig,
        seed: int,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config = config.training
        self.seed = seed
        self.device = device
        self.processes = processes or Processes()
        self.model = Vqgan(config.model).to(device).train()
        self.averages: MovingAverages | None = None
        if self.config.codebook == "ema":
            self.averages = MovingAverages(
                self.model.quantize, self.config.ema_decay, self.processes.sum
            )
        self.network = self.processes.parallel(self.model)
        """``model``, whose backward pass averages over the processes."""
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.config.lr, betas=ADAM_BETAS
        )
        self.perceptual = perceptual_loss(self.config, device)
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_optimizer: torch.optim.Adam | None = None
        if self.config.discriminator_weight > 0:
            discriminator = PatchDiscriminator(
                config.model.in_channels,
                self.config.discriminator_channels,
                self.config.discriminator_layers,
            ).to(device)
            self.discriminator = self.processes.with_global_batches(discriminator)
            self.judge = self.processes.parallel(self.discriminator)
            """``discriminator``, whose backward pass averages over the processes."""
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=self.config.lr, betas=ADAM_BETAS
            )
        self.uses_K = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=device)
        """How often each code has been chosen since the last reseeding."""
        self.measured_uses_K = torch.zeros_like(self.uses_K)
        """How often each code has been chosen since the last measurement."""
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
        folder: RunFolder | None = None,
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
        if folder is not None:
            folder.begin(self.done)
        while True:
            signal, is_late, is_save_due = self._agree(asked())
            is_over = self.done >= config.steps or (self.done > 0 and is_late)
            self.used_codes = progress.used
            if is_over:
                self.finite.check()
                check_weights(self.model, self.done)
            if signal or is_over or is_save_due:
                saver.save(must=bool(signal))
            if signal:
                place = f"step {self.done:,} of {config.steps:,}"
                report(f"{signal}: saved at {place}; the same command continues from there")
                return False
            if is_over:
                break
            self.train_step(images, progress, folder)
        if self.done < config.steps:
            report(
                f"stopped by training.max_minutes={config.max_minutes:g} after "
                f"{format_duration(clock.total())}, at step {self.done:,} of {config.steps:,}: "
                "the tokenizer is written as it is now"
            )
        return True

    def _agree(self, signal: str | None) -> tuple[str | None, bool, bool]:
        """What any process wants: to stop for a signal, to end at the time limit, to save."""
        number = signals.Signals[signal] if signal else 0
        wishes = [int(number), self.clock.left() <= 0, self.clock.is_save_due()]
        number, is_late, is_save_due = self.processes.highest(wishes)
        return (signals.Signals(number).name if number else None), bool(is_late), bool(is_save_due)

    def train_step(
        self, images: ImageSet, progress: Progress, folder: RunFolder | None = None
    ) -> None:
        """Do the next step, and what follows it."""
        config, step = self.config, self.done
        self.set_learning_rate(step)
        pixels_BCHW = training_batch(images, config, self.seed, step).to(self.device)
        losses, output = self.step(pixels_BCHW, step)
        self.finite.note(losses, step)
        if self.device.type == "cpu" or (step + 1) % config.log_every_steps == 0:
            self.finite.check()  # on a GPU, this waits for the step
        uses_K = output.codes_BN.flatten().bincount(minlength=len(self.uses_K))
        uses_K = self.processes.sum(uses_K)
        self.uses_K += uses_K
        self.measured_uses_K += uses_K
        line = progress.step(step, losses, uses_K, len(images.dropped))
        if folder is not None and line is not None:
            folder.log(step + 1, {**line, "lr": self.optimizer.param_groups[0]["lr"]})
        every = config.reseed_every_steps if self.has_movable_codes else 0
        if every and (step + 1) % every == 0 and step + 1 <= config.reseed_fraction * config.steps:
            self.reseed(output.latents_BDhw.detach(), step)
        self.done += 1
        if config.measure_every_steps and self.done % config.measure_every_steps == 0:
            self.measure(folder)

    def measure(self, folder: RunFolder | None) -> None:
        """Measure the held-out pictures, and write the page anew."""
        if folder is not None and self.measured_uses_K.any():  # not twice after the same step
            folder.measure(self.model, self.done, self.measured_uses_K)
        self.measured_uses_K.zero_()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and the time that was spent."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            **parts,
            "uses": self.uses_K,
            "measured_uses": self.measured_uses_K,
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
        if "measured_uses" in state:  # not in those of older versions
            self.measured_uses_K.copy_(state["measured_uses"])
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
        if self.averages is not None:
            parts["codebook_averages"] = self.averages
        return parts

    @property
    def has_movable_codes(self) -> bool:
        """Whether a code can be unused because its vector is far from all latents.

        The vectors of ``ibq`` all learn in every step, and ``lfq`` has none.
        """
        return self.model.config.quantizer == "vq"

    @torch.no_grad()
    def start_codebook(self, images: ImageSet) -> None:
        """Set the codebook to the first latents: vectors far from them would never be chosen."""
        if not self.has_movable_codes:
            return
        weight_KD = self.model.quantize.embedding.weight
        vectors: list[Tensor] = []
        rng = np.random.default_rng([self.seed, self.config.steps])  # a stream of its own
        batches = -(-len(weight_KD) // (self.config.batch_size * self.model.config.codes_per_image))
        for _ in range(batches):
            pixels_BCHW = to_pixels(images.draw(self.config.batch_size, rng)).to(self.device)
            vectors.append(self.processes.rows(_latent_rows(self.model.latents(pixels_BCHW))))
        rows_MD = torch.cat(vectors)
        weight_KD.copy_(rows_MD[torch.tensor(rng.permutation(len(rows_MD))[: len(weight_KD)])])
        if self.averages is not None:
            self.averages.restart()

    def set_learning_rate(self, step: int) -> None:
        lr = self.config.lr * learning_rate_share(self.config, step)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = lr

    def step(self, pixels_BCHW: Tensor, step: int) -> tuple[dict[str, Tensor], VqganOutput]:
        """Update the network, then the discriminator if it is active at this step.

        Args:
            pixels_BCHW: This process's share of the batch.
            step: Counted from 0.

        Returns:
            The losses, which are means over the whole batch, and what the network gave to the
            share.
        """
        losses: dict[str, Tensor] = {}
        self._seed_dropout(step)
        with self._autocast():
            output = self.network(pixels_BCHW)
            loss = self.network_loss(output, pixels_BCHW, step, losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.averages is not None:
            rows_MD = _latent_rows(output.latents_BDhw.detach())
            self.averages.update(rows_MD, output.codes_BN.flatten())
        if self.is_adversarial(step):
            fake_BCHW = output.reconstruction_BCHW.detach()
            losses["disc"] = self.discriminator_step(pixels_BCHW, fake_BCHW)
        losses = {name: value.detach() for name, value in losses.items()}
        return self.processes.mean_losses(losses), output

    def _autocast(self) -> torch.autocast:
        is_bf16 = self.config.dtype == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def _seed_dropout(self, step: int) -> None:
        """Let each process drop other values; what one process draws is in its state."""
        if self.processes.size > 1:
            seed = np.random.SeedSequence([self.seed, step, 2, self.processes.rank])
            torch.manual_seed(int(seed.generate_state(1)[0]))

    def is_adversarial(self, step: int) -> bool:
        """Whether a step, counted from 0, has the adversarial loss."""
        return self.discriminator is not None and step >= self.config.discriminator_start

    def network_loss(
        self, output: VqganOutput, pixels_BCHW: Tensor, step: int, losses: dict[str, Tensor]
    ) -> Tensor:
        """What the network minimises; adds its terms, without their weights, to ``losses``."""
        reconstruction = self.reconstruction_loss(output.reconstruction_BCHW, pixels_BCHW, losses)
        loss = (
            reconstruction
            + self.config.codebook_weight * output.codebook_loss
            + self.config.commitment_beta * output.commitment_loss
        )
        losses |= {"codebook": output.codebook_loss, "commit": output.commitment_loss}
        if output.entropy_loss is not None:
            losses["entropy"] = output.entropy_loss
            loss = loss + self.config.entropy_weight * output.entropy_loss
        if self.is_adversarial(step):
            assert self.discriminator is not None
            losses["gan"] = -self.discriminator(output.reconstruction_BCHW).mean()
            last_layer = self.model.decoder.conv_out.weight
            mean = self.processes.mean
            balance = adaptive_weight(reconstruction, losses["gan"], last_layer, mean)
            loss = loss + self.config.discriminator_weight * balance * losses["gan"]
        return loss

    def reconstruction_loss(
        self, fake_BCHW: Tensor, real_BCHW: Tensor, losses: dict[str, Tensor]
    ) -> Tensor:
        """How far a reconstruction is off, which the adaptive weight is relative to."""
        losses["l1"] = functional.l1_loss(fake_BCHW, real_BCHW)
        loss = self.config.l1_weight * losses["l1"]
        if self.config.l2_weight > 0:
            l2 = functional.mse_loss(fake_BCHW, real_BCHW)
            loss = loss + self.config.l2_weight * l2
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(fake_BCHW, real_BCHW)
            loss = loss + self.config.perceptual_weight * losses["perceptual"]
        return loss

    def discriminator_step(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
        assert self.discriminator_optimizer is not None
        # The network's backward pass has left gradients in the discriminator too.
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = hinge_loss(self.judge(real_BCHW), self.judge(fake_BCHW))
        loss.backward()
        self.discriminator_optimizer.step()
        return loss

    @torch.no_grad()
    def reseed(self, latents_BDhw: Tensor, step: int) -> None:
        """Move unused codebook vectors to latents of the batch, and reset their Adam state."""
        unused = (self.uses_K == 0).nonzero().flatten()
        self.uses_K.zero_()
        rows_MD = self.processes.rows(_latent_rows(latents_BDhw))
        unused = unused[: len(rows_MD)]
        rng = np.random.default_rng([self.seed, step, 1])  # a stream of its own
        chosen = torch.tensor(rng.permutation(len(rows_MD))[: len(unused)], device=self.device)
        weight_KD = self.model.quantize.embedding.weight
        weight_KD[unused] = rows_MD[chosen]
        if self.averages is not None:
            self.averages.restart(unused)
            return
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
    return latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2).float()
