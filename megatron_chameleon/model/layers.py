"""What Chameleon changes in megatron-core's layer: QK-norm, norm order.

Dimension letters in tensor names: S sequence, B batch, N heads of this rank, D head size, H hidden.
Source: paper, section 2.3; Meta's reference inference code for QK-norm (LayerNorm with bias over
the head dimension, before RoPE).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.model.backend import layer_backend
from megatron_chameleon.model.norm_rope import FUSED_DTYPES, RotaryTables, norm_rope
from megatron_chameleon.parallel.random_streams import seed_layer

QK_NORM_EPSILON = 1e-5  # of the reference code; not the RMSNorm's


class HeadLayerNorm(nn.Module):
    """LayerNorm over the head dimension, its weight and bias shared by a group of heads.

    The released checkpoints have one weight and bias a model-parallel shard, so one for each group
    of heads. Here every tensor-parallel rank holds all groups and uses the rows of its own heads,
    so that groups and ranks need not fit each other; megatron-core sums the gradients over the
    ranks, as it does for its own QK-norms, because ``qk_layernorm`` is on in its config.

    Args:
        config: The layer's config.
        hidden_size: Head size D.
        eps: Ignored: megatron-core passes the RMSNorm's.
        heads: Heads over all tensor-parallel ranks.
        groups: A divisor of ``heads``.
        deferred: The module's call changes nothing: its attention is a ``NormRopeSelfAttention``,
            which normalises later, by ``with_rotation`` where it can.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 0.0,
        *,
        heads: int,
        groups: int,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        shape, dtype = (groups, hidden_size), config.params_dtype
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self._heads_a_group = heads // groups
        local_heads = heads // config.tensor_model_parallel_size
        first = parallel_state.get_tensor_model_parallel_rank() * local_heads
        self._own_heads = slice(first, first + local_heads)
        self._deferred = deferred

    def forward(self, x_SBND: Tensor) -> Tensor:
        return x_SBND if self._deferred else self.normalise(x_SBND)

    def normalise(self, x_SBND: Tensor) -> Tensor:
        """The norm by torch's operations."""
        shape = x_SBND.shape[-1:]
        if len(self.weight) == 1:  # the same for all heads: one fused kernel, half of the time
            weight_D, bias_D = self.weight[0], self.bias[0]
            return functional.layer_norm(x_SBND, shape, weight_D, bias_D, QK_NORM_EPSILON)
        x_SBND = functional.layer_norm(x_SBND, shape, eps=QK_NORM_EPSILON)
        return x_SBND * self._of_own_heads(self.weight) + self._of_own_heads(self.bias)

    def with_rotation(self, x_SBND: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """The norm and then rotary embedding, by one kernel; ``tables`` from ``RotaryTables``."""
        return norm_rope(
            x_SBND,
            self.weight,
            self.bias,
            tables,
            first_head=self._own_heads.start,
            heads_per_group=self._heads_a_group,
            epsilon=QK_NORM_EPSILON,
        )

    def _of_own_heads(self, parameter_GD: Tensor) -> Tensor:
        return parameter_GD.repeat_interleave(self._heads_a_group, dim=0)[self._own_heads]


class NormRopeSelfAttention(SelfAttention):
    """megatron-core's self-attention, with QK-norm and rotary embedding in one kernel.

    The kernel runs in the one method between the norms' place and the rotation's that is given
    both the heads and the angles; the angles are not handed on then. The modules, their parameters
    and what a checkpoint holds are as without it, because the norms are only called later.

    Args:
        tables: Shared by all layers.
    """

    def __init__(self, *args: Any, tables: RotaryTables, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables = tables

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        assert packed_seq_params is None, "the fused QK-norm counts positions from the first token"
        return super().forward(*args, **kwargs)

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
            query_tables = self._tables.of(query_angles_S11D)
            query_SBND = self.q_layernorm.with_rotation(query_SBND, query_tables)
            key_tables = self._tables.of(key_angles_S11D)
            key_SBND = self.k_layernorm.with_rotation(key_SBND, key_tables)
            angles = None
        else:
            query_SBND = self.q_layernorm.normalise(query_SBND)
            key_SBND = self.k_layernorm.normalise(key_SBND)
        return super()._adjust_key_value_for_inference(
            inference_context, query_SBND, key_SBND, value_SBND, angles, *args, **kwargs
        )


@dataclass
class ChameleonLayerSubmodules(TransformerLayerSubmodules):
    """megatron-core's submodules, and the norms that the Swin order puts behind each branch."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class ChameleonLayer(TransformerLayer):
    """megatron-core's layer with an optional norm between each branch and its bias-dropout-add.

    With them it computes ``h = x + drop(norm(attn(x)))`` and ``y = h + drop(norm(ffn(h)))``, the
    Swin order of the 34B.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ChameleonLayerSubmodules,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.post_self_attn_layernorm = self._build_norm(submodules.post_self_attn_layernorm)
        self.post_mlp_layernorm = self._build_norm(submodules.post_mlp_layernorm)
        self.self_attn_bda: Callable = _after_norm(
            self.post_self_attn_layernorm, self.self_attn_bda
        )
        self.mlp_bda: Callable = _after_norm(self.post_mlp_layernorm, self.mlp_bda)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.config.hidden_dropout > 0:
            seed_layer(self.layer_number)
        return super().forward(*args, **kwargs)

    def _build_norm(self, spec: ModuleSpec | type) -> nn.Module:
        return build_module(
            spec,
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )


def _after_norm(norm: nn.Module, get_bias_dropout_add: Callable) -> Callable:
    """megatron-core's bias-dropout-add factory with ``norm`` applied to the branch first."""
    if isinstance(norm, IdentityOp):
        return get_bias_dropout_add

    def get_norm_bias_dropout_add(training: bool, fused: bool) -> Callable:
        bias_dropout_add = get_bias_dropout_add(training, fused)

        def norm_bias_dropout_add(
            branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
        ) -> Tensor:
            branch, bias = branch_and_bias
            branch = norm(branch if bias is None else branch + bias)
            return bias_dropout_add((branch, None), residual, probability)

        return norm_bias_dropout_add

    return get_norm_bias_dropout_add


def block_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    swin_norm: bool,
    qk_norm_groups: int,
    qk_norm_rope_fusion: bool = False,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of the layers of one part of the model.

    Args:
        config: megatron-core's config.
        backend: From ``select_backend``.
        swin_norm: Norms behind the branches (34B) in place of before them (7B).
        qk_norm_groups: Groups of heads with a QK-norm weight of their own, 0 for no QK-norm.
        qk_norm_rope_fusion: QK-norm and rotary embedding in one kernel; nothing without QK-norm.
        vp_stage: Which of this pipeline stage's parts, with interleaved pipeline parallelism.
    """
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    backends = [layer_backend(backend, config, layer) for layer in layers]
    tables = RotaryTables() if qk_norm_rope_fusion and qk_norm_groups else None
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, b, swin_norm, qk_norm_groups, tables) for b in backends],
        layer_norm=backend.layer_norm(rms_norm=True),
    )


def _layer_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    swin_norm: bool,
    qk_norm_groups: int,
    tables: RotaryTables | None,
) -> ModuleSpec:
    """``tables``: for QK-norm and rotary embedding in one kernel."""
    norm = backend.layer_norm(rms_norm=True)
    before, behind = (IdentityOp, norm) if swin_norm else (norm, IdentityOp)
    fused = tables is not None
    attention = ModuleSpec(
        module=NormRopeSelfAttention if fused else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **({"tables": tables} if fused else {})},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=_qk_norm_spec(config.num_attention_heads, qk_norm_groups, fused),
            k_layernorm=_qk_norm_spec(config.num_query_groups, qk_norm_groups, fused),
        ),
    )
    mlp = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    return ModuleSpec(
        module=ChameleonLayer,
        submodules=ChameleonLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            post_self_attn_layernorm=behind,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            post_mlp_layernorm=behind,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _qk_norm_spec(heads: int, groups: int, deferred: bool) -> ModuleSpec | type:
    """Key heads may be fewer than the groups: then each has its own."""
    if not groups:
        return IdentityOp
    params = {"heads": heads, "groups": min(groups, heads), "deferred": deferred}
    return ModuleSpec(HeadLayerNorm, params=params)
