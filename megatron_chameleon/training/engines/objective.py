"""The loss that both engines minimise, and the same loss on held-out documents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chameleon.config.finetuning import DpoConfig
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.training.metrics.step_metrics import StepMonitor
from megatron_chameleon.training.preference.loss import PAIR_SUMS, pair_sums, preference_loss

Output = tuple[Tensor, Tensor, Tensor]
"""What the model returns: cross-entropy, log(Z) and largest logit, each [B, S]."""


def summed_loss(
    batch: Batch,
    output: Output,
    z_loss: float,
    monitor: StepMonitor,
    dpo: DpoConfig | None = None,
) -> Tensor:
    """The loss of a micro-batch: a sum over its unmasked tokens, or over its pairs.

    It is cross-entropy and weighted z-loss, or what ``preference.py`` says. The engine divides by
    the sum of ``loss_count`` over the whole global batch. Micro-batches have different counts, so a
    mean of their means would be a different loss.

    Args:
        batch: On this process's device.
        output: What the model returned.
        z_loss: Weight of log(Z)^2. ``StepMetrics.z_loss`` logs the same term.
        monitor: Takes in the micro-batch.
        dpo: How preferences are trained, for a micro-batch of pairs.

    Returns:
        A scalar, to call ``backward`` on.
    """
    cross_entropy, log_z, max_logit = output
    monitor.observe_loss(batch, cross_entropy.detach(), log_z.detach(), max_logit)
    if batch.pairs is not None:
        loss, sums = preference_loss(batch, output, z_loss, dpo or DpoConfig())
        monitor.observe_pairs(sums)
        return loss
    return ((cross_entropy + z_loss * log_z.square()) * batch.loss_mask).sum()


def loss_count(batch: Batch) -> Tensor:
    """What the loss of a step is a mean over: unmasked tokens, or pairs. A scalar, int32."""
    if batch.pairs is not None:
        return torch.tensor(batch.pairs.count, dtype=torch.int32, device=batch.loss_mask.device)
    return batch.loss_mask.sum().int()


@dataclass(frozen=True)
class Measurement:
    """Numbers of a micro-batch that are taken without gradients."""

    values: Callable[[Batch, Output], Tensor]
    """float64 [count]."""
    count: int


def held_out_measurement(config: Config) -> Measurement:
    """What is measured on held-out documents: ``modality_sums``, or ``PAIR_SUMS`` of pairs."""
    if config.training.objective == "dpo":
        return Measurement(lambda b, o: pair_sums(b, o, config.dpo), len(PAIR_SUMS))
    return Measurement(modality_sums, 4)


def modality_sums(batch: Batch, output: Output) -> Tensor:
    """Cross-entropy and numbers of tokens of a micro-batch, without gradients.

    Args:
        batch: On this process's device.
        output: What the model returned.

    Returns:
        float64 [4]: summed cross-entropy and number of the unmasked text tokens, then of the
        unmasked image codes.
    """
    cross_entropy = output[0].detach().double()
    image_mask = (batch.loss_mask * batch.image_mask).double()
    text_mask = batch.loss_mask.double() - image_mask
    masked = [(cross_entropy * mask, mask) for mask in (text_mask, image_mask)]
    return torch.stack([value.sum() for pair in masked for value in pair])
