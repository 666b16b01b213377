"""The loss that both engines minimise."""

from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel import platform
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


def own_part(batch: Batch) -> Batch:
    """The batch on this rank's device; of each sequence, what context parallelism assigns to it."""
    tensors: dict[str, Tensor] = {
        name: _pinned(tensor).to(platform.device(), non_blocking=True)
        for name, tensor in vars(batch).items()
        if tensor is not None
    }
    return Batch(**get_batch_on_this_cp_rank(tensors))


def _pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory that a GPU can fetch without a wait.

    A copy from pageable memory would wait for the micro-batch before it.
    """
    # An expanded tensor cannot be pinned as it is, hence the contiguous copy.
    return tensor.contiguous().pin_memory() if platform.has_gpu() else tensor
