"""Cross-entropy and log(Z), Z the softmax normaliser, over logits split along the vocabulary.

Chameleon's loss is ``cross_entropy + z_loss * log(Z)^2`` (paper, section 2.3). One autograd
function gives both terms with their exact gradients: with p the softmax, d cross_entropy / d logits
= p - onehot and d log(Z) / d logits = p.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Two all-reduces and one buffer of the logits' size, as cross-entropy alone needs.

    The softmax is never written out: the backward pass divides by its sums while it multiplies by
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
    """Each label's column in this rank's part of the vocabulary [..., 1]; where it has none."""
    first, last = VocabUtility.vocab_range_from_per_partition_vocab_size(
        local_size, group.rank(), group.size()
    )
    elsewhere = (labels < first).logical_or_(labels >= last)
    return (labels - first).masked_fill_(elsewhere, 0).unsqueeze(-1), elsewhere


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
        flow through the first two; a backward pass uses up the buffer, so there can be only one.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group)
