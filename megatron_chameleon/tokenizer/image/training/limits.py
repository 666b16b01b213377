"""What stops the training of an image tokenizer: too little memory, or values not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_chameleon.errors import ConfigError, TrainingError
from megatron_chameleon.machine import machine_memory, too_large
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from megatron_chameleon.tokenizer.image.losses.discriminator import PatchDiscriminator
from megatron_chameleon.tokenizer.image.shape import activation_bytes
from megatron_chameleon.tokenizer.image.training.progress import FIRST_STEPS
from megatron_chameleon.tokenizer.image.vqgan import Vqgan
from megatron_chameleon.wording import counted, format_bytes, format_count

TRAINING_BYTES = 16
"""Bytes per parameter: fp32 weight and gradient, and Adam's two averages."""


@dataclass(frozen=True)
class Needs:
    """What a training needs, by arithmetic."""

    parameters: int
    """Of the network."""
    judges: int
    """Parameters of the discriminator."""
    state_bytes: int
    """Weights, gradients and the optimizer's averages."""
    activation_bytes: int
    """What the residual blocks keep for the backward pass of this process's share."""

    @property
    def bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def needs_of(config: ImageTokenizerConfig, processes: int = 1) -> Needs:
    """What each of the processes needs. Nothing is allocated."""
    training = config.training
    judges = 0
    with torch.device("meta"):
        parameters = _parameters(Vqgan(config.model))
        if training.discriminator_weight > 0:
            channels, layers = training.discriminator_channels, training.discriminator_layers
            judges = _parameters(PatchDiscriminator(config.model.in_channels, channels, layers))
    per_value = 2 if training.dtype == "bf16" else 4
    activations = training.batch_size // processes * activation_bytes(config.model)
    return Needs(
        parameters, judges, (parameters + judges) * TRAINING_BYTES, activations * per_value // 4
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_fits(config: ImageTokenizerConfig, device: torch.device, processes: int = 1) -> None:
    """Refuse a training that this machine cannot do. Nothing is allocated.

    Raises:
        ConfigError: It does not fit into memory, and names the largest part and the number of
            bytes; or the device cannot compute in the type that the config names.
    """
    if config.training.dtype == "bf16":
        _check_bf16(device)
    if device.type == "cuda":
        has, place = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        has, place = machine_memory(), "this machine"
    needs = needs_of(config, processes)
    where, remedy = "training.batch_size", "Use smaller batches, a lower resolution or less width"
    if needs.state_bytes > needs.activation_bytes:
        where, remedy = "model", "Use fewer channels, residual blocks or codes"
    if problem := too_large(where, needs.bytes, has, remedy, place):
        raise problem


def _check_bf16(device: torch.device) -> None:
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)
        what = f"{torch.cuda.get_device_name(device)} cannot compute in bf16"
    else:
        can = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        what = "this CPU cannot compute in bf16"
    if not can:
        raise ConfigError("training.dtype", what, "Use training.dtype=fp32")


def describe_cost(
    config: ImageTokenizerConfig, needs: Needs, images: int, held_out: int, processes: int
) -> str:
    """What a training will take, as far as it is known before its first step."""
    training, model = config.training, config.model
    judged = f" and {format_count(needs.judges)} of the discriminator" if needs.judges else ""
    cached = min(training.cache_gib * 2**30, images * 3 * model.resolution**2) / processes
    epochs = training.steps * training.batch_size / images
    shared = f", shared by {processes} processes" if processes > 1 else ""
    each = " in each" if processes > 1 else ""
    return (
        f"{format_count(needs.parameters)} parameters{judged}, {training.dtype}, about "
        f"{format_bytes(needs.bytes + cached)} of memory{each}; {counted(images, 'picture')}, "
        f"{held_out:,} held out; {training.steps:,} steps of {training.batch_size:,}{shared}, "
        f"{epochs:.3g} epochs; the time is known after {FIRST_STEPS} steps"
    )


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
