"""The loss that both engines minimise, and the same loss on held-out documents."""

import torch
from torch import Tensor

from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.training.metrics.step_metrics import StepMonitor


def summed_loss(
    batch: Batch, output: tuple[Tensor, Tensor, Tensor], z_loss: float, monitor: StepMonitor
) -> Tensor:
    """Cross-entropy and weighted z-loss, summed over the unmasked tokens of a micro-batch.

    The engine divides by the number of unmasked tokens in the whole global batch. Micro-batches
    have different numbers of them, so a mean of their means would be a different loss.

    Args:
        batch: On this process's device.
        output: What the model returned: cross-entropy, log(Z) and largest logit, each [B, S].
        z_loss: Weight of log(Z)^2. ``StepMetrics.z_loss`` logs the same term.
        monitor: Takes in the micro-batch.

    Returns:
        A scalar, to call ``backward`` on.
    """
    cross_entropy, log_z, max_logit = output
    monitor.observe_loss(batch, cross_entropy.detach(), log_z.detach(), max_logit)
    return ((cross_entropy + z_loss * log_z.square()) * batch.loss_mask).sum()


def modality_sums(batch: Batch, output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
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
