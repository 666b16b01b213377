"""What stops the training of an image tokenizer: too little memory, and values not finite."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_chameleon.errors import TrainingError
from megatron_chameleon.machine import machine_memory, too_large
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from megatron_chameleon.tokenizer.image.losses.discriminator import PatchDiscriminator
from megatron_chameleon.tokenizer.image.shape import activation_bytes
from megatron_chameleon.tokenizer.image.vqgan import Vqgan

TRAINING_BYTES = 16
"""Bytes per parameter: fp32 weight and gradient, and Adam's two averages."""


def check_memory(config: ImageTokenizerConfig, device: torch.device) -> None:
    """Refuse a training that cannot fit into memory. Nothing is allocated.

    Raises:
        ConfigError: It names the largest part and the number of bytes.
    """
    if device.type == "cuda":
        has, place = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        has, place = machine_memory(), "this machine"
    training = config.training
    with torch.device("meta"):
        parts: list[nn.Module] = [Vqgan(config.model)]
        if training.discriminator_weight > 0:
            channels, layers = training.discriminator_channels, training.discriminator_layers
            parts.append(PatchDiscriminator(config.model.in_channels, channels, layers))
    weights = sum(p.numel() for part in parts for p in part.parameters()) * TRAINING_BYTES
    activations = training.batch_size * activation_bytes(config.model)
    where, remedy = "training.batch_size", "Use smaller batches, a lower resolution or less width"
    if weights > activations:
        where, remedy = "model", "Use fewer channels, residual blocks or codes"
    if problem := too_large(where, weights + activations, has, remedy, place):
        raise problem


class FiniteLosses:
    """Remembers on the device at which step a loss was not finite first.

    Args:
        device: Where the losses are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._names: list[str] = []
        self._bad: Tensor | None = None

    def note(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Look at the losses of a step, counted from 0, without waiting for the device."""
        bad = ~torch.isfinite(torch.stack(list(losses.values())))
        if self._bad is None or len(bad) != len(self._bad):  # the adversarial losses begin later
            self.check()
            self._bad, self._names = torch.zeros_like(bad), list(losses)
        is_first = bad.any() & torch.isinf(self._step)
        self._step = torch.where(is_first, torch.full_like(self._step, step + 1), self._step)
        self._bad = torch.where(is_first, bad, self._bad)

    def check(self) -> None:
        """Wait for the device, and stop if a loss was not finite.

        Raises:
            TrainingError: It names the step and the losses.
        """
        step = self._step.item()
        if math.isinf(step):
            return
        assert self._bad is not None
        flags = zip(self._names, self._bad.tolist(), strict=True)
        names = ", ".join(name for name, is_bad in flags if is_bad)
        raise not_finite(int(step), f"the losses {names} are not finite")


def check_weights(model: nn.Module, step: int) -> None:
    """Refuse weights that are not finite, after the last step.

    Raises:
        TrainingError: It names one of them.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise not_finite(step, f"the weights {name} are not finite")


def not_finite(step: int, what: str) -> TrainingError:
    """Why the training stops, and what to do. ``step`` is counted from 1."""
    remedy = "Use a lower training.lr; nothing was written, so an older tokenizer is still there"
    return TrainingError(f"step {step}", what, remedy)
