"""Cross-entropy and log(Z), Z the softmax normaliser, over logits split along the vocabulary.

Chameleon's loss is ``cross_entropy + z_loss * log(Z)^2`` (paper, section 2.3). One autograd
function computes both terms with their exact gradients: with p the softmax, d cross_entropy /
d logits = p - onehot and d log(Z) / d logits = p. It exists twice: with torch's operations, which
run anywhere, and with Triton kernels, which keep the logits in their own dtype and overwrite them
with their gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup, ReduceOp, all_gather_into_tensor, all_reduce

LossParts = Callable[[Tensor, Tensor, ProcessGroup], tuple[Tensor, Tensor, Tensor]]
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_loss_parts(fused: bool) -> LossParts:
    """``vocab_parallel_cross_entropy``, or its fused counterpart, which needs Triton and a GPU."""
    return fused_vocab_parallel_cross_entropy if fused else vocab_parallel_cross_entropy


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Two all-reduces and one buffer of the logits' size: no more than cross-entropy alone needs.

    The softmax is never written out. The backward pass divides by its sums while it multiplies by
    the incoming gradient, which saves a pass over the buffer.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.logits_dtype, ctx.group = logits.dtype, group
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        max_logit = logits.amax(dim=-1)
        all_reduce(max_logit, ReduceOp.MAX, group)
        # In place: the layer that made the logits does not need them for its backward pass.
        shifted = logits.sub_(max_logit.unsqueeze(-1))

        columns, elsewhere = _local_columns(labels, logits.size(-1), group)
        sums = shifted.new_empty(2, *labels.shape)
        sum_exp, label_logit = sums[0], sums[1]
        label_logit.copy_(shifted.gather(-1, columns).squeeze(-1)).masked_fill_(elsewhere, 0.0)
        exponentials = shifted.exp_()
        torch.sum(exponentials, dim=-1, out=sum_exp)
        all_reduce(sums, ReduceOp.SUM, group)

        log_sum_exp = sum_exp.log()
        ctx.save_for_backward(exponentials, sum_exp, labels)
        ctx.mark_non_differentiable(max_logit)
        return log_sum_exp - label_logit, log_sum_exp + max_logit, max_logit

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_log_z: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None]:
        exponentials, sum_exp, labels = ctx.saved_tensors
        columns, elsewhere = _local_columns(labels, exponentials.size(-1), ctx.group)
        factor = (grad_cross_entropy + grad_log_z).div_(sum_exp)
        grad_logits = exponentials.mul_(factor.unsqueeze(-1))
        at_label = grad_cross_entropy.masked_fill(elsewhere, 0.0).neg_()
        grad_logits.scatter_add_(-1, columns, at_label.unsqueeze(-1))
        return grad_logits.to(ctx.logits_dtype), None, None


def _local_columns(labels: Tensor, local_size: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Each label's column in this rank's part of the vocabulary, [..., 1]; and which have none."""
    first, last = _local_range(local_size, group)
    elsewhere = (labels < first).logical_or_(labels >= last)
    return (labels - first).masked_fill_(elsewhere, 0).unsqueeze(-1), elsewhere


def _local_range(local_size: int, group: ProcessGroup) -> tuple[int, int]:
    """The first id of this rank's part of the vocabulary, and the one after the last."""
    first, last = VocabUtility.vocab_range_from_per_partition_vocab_size(
        local_size, group.rank(), group.size()
    )
    return first, last


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, log(Z) and the largest logit of each position.

    Args:
        logits: [..., vocabulary / group size] of this rank, any float dtype; fp32 and fp64 logits
            are overwritten.
        labels: [...] token ids of the whole vocabulary, the same on all ranks of ``group``.
        group: The tensor-parallel group.

    Returns:
        cross_entropy, log_z and max_logit, each [...], in fp32 (fp64 for fp64 logits). Gradients
        flow through the first two. A backward pass overwrites the buffer, so there can be only one.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group)


class _FusedVocabParallelCrossEntropy(torch.autograd.Function):
    """One gather of three numbers per token, and no buffer: the gradient overwrites the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        from megatron_chameleon.model.kernels.cross_entropy import row_statistics

        rows, row_labels = _as_rows(logits), labels.reshape(-1).contiguous()
        ctx.first, _ = _local_range(logits.size(-1), group)
        statistics = row_statistics(rows, row_labels, ctx.first)
        max_logit, sum_exp, label_logit = _over_ranks(statistics, group)
        ctx.save_for_backward(rows, row_labels, max_logit, sum_exp)
        ctx.logits_shape = logits.shape
        log_sum_exp = sum_exp.log()
        cross_entropy = log_sum_exp - (label_logit - max_logit)
        max_of_labels = max_logit.view(labels.shape)
        ctx.mark_non_differentiable(max_of_labels)
        log_z = (log_sum_exp + max_logit).view(labels.shape)
        return cross_entropy.view(labels.shape), log_z, max_of_labels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_log_z: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None]:
        from megatron_chameleon.model.kernels.cross_entropy import write_gradient_

        rows, labels, max_logit, sum_exp = ctx.saved_tensors
        at_label = grad_cross_entropy.reshape(-1).contiguous()
        factor = (at_label + grad_log_z.reshape(-1)).div_(sum_exp)
        write_gradient_(rows, labels, max_logit, factor, at_label, ctx.first)
        increment_version(rows)  # the logits are gone: autograd must refuse a second backward pass
        return rows.view(ctx.logits_shape), None, None


def _as_rows(logits: Tensor) -> Tensor:
    """[..., columns] as [tokens, columns]: a view where possible, with rows that do not overlap."""
    rows = logits.detach().reshape(-1, logits.size(-1))
    separate = len(rows) == 1 or rows.stride(0) >= rows.size(-1)
    return rows if rows.stride(-1) == 1 and separate else rows.contiguous()


def _over_ranks(statistics: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Combine each rank's maximum, sum of exponentials and label's logit to those of whole rows."""
    if group.size() == 1:
        max_logit, sum_exp, label_logit = statistics.unbind()
        return max_logit, sum_exp, label_logit
    gathered = statistics.new_empty(3 * group.size(), statistics.size(1))
    all_gather_into_tensor(gathered, statistics, group)
    max_logits, sums, label_logits = gathered.view(group.size(), 3, -1).unbind(dim=1)
    max_logit = max_logits.amax(dim=0)
    sum_exp = sums.mul(max_logits.sub(max_logit).exp_()).sum(dim=0)
    return max_logit, sum_exp, label_logits.sum(dim=0)


def fused_vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """``vocab_parallel_cross_entropy`` by Triton, with one pass forward and one backward.

    Args:
        logits: As in ``vocab_parallel_cross_entropy``. The backward pass overwrites them with their
            gradient, in any dtype. fp64 logits are computed by the unfused function.
        labels: As there.
        group: As there.

    Returns:
        As there, with the same rounding to fp32 and the same NaNs and infinities.
    """
    if logits.dtype not in FUSED_DTYPES:
        return vocab_parallel_cross_entropy(logits, labels, group)
    return _FusedVocabParallelCrossEntropy.apply(logits, labels, group)
