"""QK-norm and rotary embedding in one Triton kernel: off until a GPU has measured the gain.

``fuse_qk_norm`` is the only entrance to this file. It changes the spec of the attention so that the
norms are applied later, together with the rotation. Modules, parameters and checkpoints stay as
they are without it.

Dimension letters as in ``layers.py``, and C = D / 2, the angles of a position.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_chameleon.model.isolation import IsolatedDocuments
from megatron_chameleon.model.layers import QK_NORM_EPSILON, HeadLayerNorm

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuse_qk_norm(block: TransformerBlockSubmodules) -> None:
    """Make the layers of a spec compute QK-norm and rotary embedding in one kernel.

    A spec without QK-norm stays as it is.

    Args:
        block: From ``block_spec``; changed in place.
    """
    tables = RotaryTables()
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        norms = (attention.submodules.q_layernorm, attention.submodules.k_layernorm)
        if IdentityOp in norms:
            continue
        attention.module = NormRopeSelfAttention
        attention.params["tables"] = tables
        for norm in norms:
            norm.module = DeferredHeadLayerNorm


class RotaryTables:
    """The cosines and sines of megatron-core's angles, computed once for all layers."""

    def __init__(self) -> None:
        self._no_positions = torch.empty(0)
        self._given = self._no_positions, self._no_positions
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(
        self, angles_S11D: Tensor, position_ids_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[S, C] each, in fp32; the second half of the angles repeats the first.

        Args:
            angles_S11D: Of the positions from 0 on.
            position_ids_T: The position of each token, of which there are then T in place of S;
                None if token and position have the same number.
        """
        given = angles_S11D, self._no_positions if position_ids_T is None else position_ids_T
        # is_set_to, because a recomputed layer gets new views of the same tensors
        if self._tables is None or not all(map(Tensor.is_set_to, given, self._given)):
            angles_SC = angles_S11D[:, 0, 0, : angles_S11D.size(-1) // 2].float()
            if position_ids_T is not None:
                angles_SC = angles_SC[position_ids_T]
            self._given = given
            self._tables = angles_SC.cos().contiguous(), angles_SC.sin().contiguous()
        return self._tables


class DeferredHeadLayerNorm(HeadLayerNorm):
    """A QK-norm that returns its input unchanged when it is called.

    ``NormRopeSelfAttention`` applies it later: by ``with_rotation``, or by ``normalise`` where the
    kernel cannot run.
    """

    def forward(self, x_SBND: Tensor) -> Tensor:
        return x_SBND

    def normalise(self, x_SBND: Tensor) -> Tensor:
        """The norm by torch's operations."""
        return super().forward(x_SBND)

    def with_rotation(self, x_SBND: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """The norm and then the rotary embedding, by one kernel."""
        return norm_rope(
            x_SBND,
            self.weight,
            self.bias,
            tables,
            first_head=self.own_heads.start,
            heads_per_group=self.heads_per_group,
            epsilon=QK_NORM_EPSILON,
        )


class NormRopeSelfAttention(SelfAttention):
    """megatron-core's self-attention, with QK-norm and rotary embedding in one kernel.

    Of the methods that megatron-core calls between norm and rotation, one is given both the heads
    and the angles. The kernel runs there, and the angles are then not passed on.

    Args:
        tables: Shared by all layers.
    """

    def __init__(self, *args: Any, tables: RotaryTables, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables = tables
        self._position_ids_T: Tensor | None = None

    def forward(
        self, *args: Any, packed_seq_params: IsolatedDocuments | None = None, **kwargs: Any
    ) -> Any:
        self._position_ids_T = packed_seq_params and packed_seq_params.own_positions
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query_SBND: Tensor,
        key_SBND: Tensor,
        value_SBND: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        dtype = query_SBND.dtype
        if angles is not None and inference_context is None and dtype in FUSED_DTYPES:
            query_angles_S11D, key_angles_S11D = angles
            query_tables = self._tables.of(query_angles_S11D, self._position_ids_T)
            query_SBND = self.q_layernorm.with_rotation(query_SBND, query_tables)
            key_tables = self._tables.of(key_angles_S11D, self._position_ids_T)
            key_SBND = self.k_layernorm.with_rotation(key_SBND, key_tables)
            angles = None
        else:
            query_SBND = self.q_layernorm.normalise(query_SBND)
            key_SBND = self.k_layernorm.normalise(key_SBND)
        return super()._adjust_key_value_for_inference(
            inference_context, query_SBND, key_SBND, value_SBND, angles, *args, **kwargs
        )


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
        weight_GD: The weights of all groups of heads.
        bias_GD: The biases of all groups of heads.
        tables: Cosines and sines of each of x's S tokens, from ``RotaryTables``.
        first_head: The number of x's first head among the heads of all ranks.
        heads_per_group: Number of heads that share a weight and bias.
        epsilon: Added to the variance.

    Returns:
        [S, B, N, D], contiguous.
    """
    cos_SC, sin_SC = tables
    heads = (first_head, heads_per_group)
    return _NormRope.apply(x_SBND, weight_GD, bias_GD, cos_SC, sin_SC, heads, epsilon)


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

        x_SBND = _contiguous_heads(x_SBND)
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
            _contiguous_heads(grad_SBND),
            weight_GD,
            cos_SC,
            sin_SC,
            first_head,
            heads_per_group,
            ctx.epsilon,
        )
        # Every rank holds all groups; this rank adds nothing to those of other ranks' heads.
        groups = len(weight_GD)
        of_heads = sums_2ND.new_zeros(2, groups * heads_per_group, sums_2ND.size(-1))
        of_heads[:, first_head : first_head + sums_2ND.size(1)] = sums_2ND
        of_groups = of_heads.view(2, groups, heads_per_group, -1).sum(dim=2).to(weight_GD.dtype)
        return grad_x_SBND, of_groups[0], of_groups[1], None, None, None, None


def _contiguous_heads(x_SBND: Tensor) -> Tensor:
    """The same values, with the elements of each head next to each other in memory."""
    return x_SBND if x_SBND.stride(-1) == 1 else x_SBND.contiguous()
