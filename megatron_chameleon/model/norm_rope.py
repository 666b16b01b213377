"""QK-norm and rotary embedding as one operation, by Triton kernels.

Dimension letters as in ``layers.py``; C = D / 2, the angles of a position.
"""

from typing import Any

import torch
from torch import Tensor

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RotaryTables:
    """cos and sin of megatron-core's angles; one object for all layers, which get the same."""

    def __init__(self) -> None:
        self._angles = torch.empty(0)
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(self, angles_S11D: Tensor) -> tuple[Tensor, Tensor]:
        """[S, C] each, in fp32; the second half of the angles repeats the first."""
        # a recomputed layer gets a new view of the same angles
        if self._tables is None or not angles_S11D.is_set_to(self._angles):
            angles_SC = angles_S11D[:, 0, 0, : angles_S11D.size(-1) // 2].float()
            self._angles = angles_S11D
            self._tables = angles_SC.cos().contiguous(), angles_SC.sin().contiguous()
        return self._tables


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SBND: Tensor,
        weight_GD: Tensor,
        bias_GD: Tensor,
        cos_SC: Tensor,
        sin_SC: Tensor,
        heads: tuple[int, int],
        epsilon: float,
    ) -> Tensor:
        from megatron_chameleon.model.kernels import norm_rope as kernels

        x_SBND = _with_rows(x_SBND)
        ctx.save_for_backward(x_SBND, weight_GD, cos_SC, sin_SC)
        ctx.heads, ctx.epsilon = heads, epsilon
        return kernels.forward(x_SBND, weight_GD, bias_GD, cos_SC, sin_SC, *heads, epsilon)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_chameleon.model.kernels import norm_rope as kernels

        x_SBND, weight_GD, cos_SC, sin_SC = ctx.saved_tensors
        first_head, heads_per_group = ctx.heads
        grad_x_SBND, sums_2ND = kernels.backward(
            x_SBND,
            _with_rows(grad_SBND),
            weight_GD,
            cos_SC,
            sin_SC,
            first_head,
            heads_per_group,
            ctx.epsilon,
        )
        # every rank has all groups: those of other ranks' heads get nothing from this one
        groups = len(weight_GD)
        of_heads = sums_2ND.new_zeros(2, groups * heads_per_group, sums_2ND.size(-1))
        of_heads[:, first_head : first_head + sums_2ND.size(1)] = sums_2ND
        of_groups = of_heads.view(2, groups, heads_per_group, -1).sum(dim=2).to(weight_GD.dtype)
        return grad_x_SBND, of_groups[0], of_groups[1], None, None, None, None


def _with_rows(x_SBND: Tensor) -> Tensor:
    """The elements of a head side by side."""
    return x_SBND if x_SBND.stride(-1) == 1 else x_SBND.contiguous()


def norm_rope(
    x_SBND: Tensor,
    weight_GD: Tensor,
    bias_GD: Tensor,
    tables: tuple[Tensor, Tensor],
    *,
    first_head: int,
    heads_per_group: int,
    epsilon: float,
) -> Tensor:
    """LayerNorm over each head, then rotary embedding in halves, in fp32 and rounded once.

    Args:
        x_SBND: Queries or keys of this rank, bf16, fp16 or fp32.
        weight_GD: Of all groups of heads.
        bias_GD: As the weight.
        tables: cos and sin of ``RotaryTables``.
        first_head: Which of all heads is x's first.
        heads_per_group: Heads that share a weight and bias.
        epsilon: Of the norm.

    Returns:
        [S, B, N, D], contiguous.
    """
    cos_SC, sin_SC = tables
    heads = (first_head, heads_per_group)
    return _NormRope.apply(x_SBND, weight_GD, bias_GD, cos_SC, sin_SC, heads, epsilon)
