"""What Chameleon changes in megatron-core's layer: QK-norm, norm order, CPU core attention.

Dimension letters in tensor names: S sequence, B batch, N heads of this rank, D head size, H hidden.
Source: paper, section 2.3; Meta's reference inference code for QK-norm (LayerNorm with bias over
the head dimension, before RoPE).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

QK_NORM_EPSILON = 1e-5  # of the reference code; not the RMSNorm's


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks where sequences are split."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadLayerNorm(nn.Module):
    """LayerNorm over the head dimension, its weight and bias shared by a group of heads.

    The released checkpoints have one weight and bias a model-parallel shard, so one for each group
    of heads.

    Args:
        config: The layer's config; its tensor-parallel size splits the groups over the ranks.
        hidden_size: Head size D.
        eps: Ignored: megatron-core passes the RMSNorm's.
        groups: Groups over all ranks, a multiple of the tensor-parallel size.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 0.0, *, groups: int
    ) -> None:
        super().__init__()
        local_groups = groups // config.tensor_model_parallel_size
        shape, dtype = (local_groups, hidden_size), config.params_dtype
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, dtype=dtype))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self, x_SBND: Tensor) -> Tensor:
        heads_a_group = x_SBND.size(2) // self.weight.size(0)
        weight_ND = self.weight.repeat_interleave(heads_a_group, dim=0)
        bias_ND = self.bias.repeat_interleave(heads_a_group, dim=0)
        x_SBND = functional.layer_norm(x_SBND, x_SBND.shape[-1:], eps=QK_NORM_EPSILON)
        return x_SBND * weight_ND + bias_ND

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "dp_cp"])
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=groups.tp,
            dp_cp_group=groups.dp_cp,
        )


class ScaledDotProductAttention(MegatronModule):
    """Core attention by torch's fused kernel, for machines without Transformer Engine.

    megatron-core's own unfused attention writes the S x S scores out; on CPUs this is about a tenth
    faster for the whole model.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        mask_B1SS: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally, or where ``mask_B1SS`` is False; returns [S, B, N * D]."""
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = functional.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            dropout_p=self.dropout if self.training else 0.0,
            attn_mask=None if mask_B1SS is None else ~mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=q_BNSD.size(1) != k_BGSD.size(1),
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


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
    config: TransformerConfig, *, swin_norm: bool, qk_norm_groups: int
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers.

    Args:
        config: megatron-core's config; its ``qk_layernorm`` must be off, because megatron-core
            would then sum the gradients of these norms, which are split over the tensor-parallel
            ranks, over those ranks.
        swin_norm: Norms behind the branches (34B) in place of before them (7B).
        qk_norm_groups: Groups of heads with a QK-norm weight of their own, 0 for no QK-norm.
    """
    layers = [_layer_spec(config, swin_norm, qk_norm_groups)] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(config: TransformerConfig, swin_norm: bool, qk_norm_groups: int) -> ModuleSpec:
    local = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    submodules = ChameleonLayerSubmodules(
        **{field.name: getattr(local, field.name) for field in fields(TransformerLayerSubmodules)}
    )
    submodules.sharded_state_dict_keys_map = {}  # the local spec's renames fit fused norms only
    attention = submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if qk_norm_groups:
        key_groups = min(qk_norm_groups, config.num_query_groups)
        for name, groups in (("q_layernorm", qk_norm_groups), ("k_layernorm", key_groups)):
            setattr(attention, name, ModuleSpec(HeadLayerNorm, params={"groups": groups}))
    before, behind = (IdentityOp, RMSNorm) if swin_norm else (RMSNorm, IdentityOp)
    submodules.input_layernorm = submodules.pre_mlp_layernorm = before
    submodules.post_self_attn_layernorm = submodules.post_mlp_layernorm = behind
    return ModuleSpec(module=ChameleonLayer, submodules=submodules)
