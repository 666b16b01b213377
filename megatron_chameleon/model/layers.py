"""Chameleon's transformer layer: megatron-core's, with QK-norm and a choice of norm order.

Dimension letters in tensor names: S sequence, B batch, N heads of this rank, D head size.
Source: the Chameleon paper (arXiv 2405.09818), section 2.3; Meta's reference inference code for
QK-norm (LayerNorm with bias over the head dimension, before the rotary embedding).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from megatron_chameleon.parallel.random_streams import seed_layer

QK_NORM_EPSILON = 1e-5  # the reference code's; the RMSNorms have their own

Spec: TypeAlias = ModuleSpec | type


def block_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    norm_order: str,
    qk_norm_groups: int,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of all layers in one part of the model, and of the final norm.

    Args:
        config: megatron-core's config.
        backend: From ``select_backend``.
        norm_order: "pre" (the 7B) or "swin" (the 34B).
        qk_norm_groups: Number of groups of heads with a QK-norm weight of their own; 0 for no
            QK-norm.
        vp_stage: Which of this pipeline stage's parts, for interleaved pipeline parallelism.
    """
    layer_spec = {"pre": pre_norm_layer, "swin": swin_layer}[norm_order]
    first = get_transformer_layer_offset(config, vp_stage)
    layer_specs = []
    for layer in range(first, first + get_num_layers_to_build(config, vp_stage)):
        parts = layer_backend(backend, config, layer)
        norm = parts.layer_norm(rms_norm=True)
        attention = attention_spec(config, parts, qk_norm_groups)
        layer_specs.append(layer_spec(norm, attention, feed_forward_spec(parts)))
    return TransformerBlockSubmodules(layer_specs, layer_norm=backend.layer_norm(rms_norm=True))


def pre_norm_layer(norm: Spec, attention: ModuleSpec, feed_forward: ModuleSpec) -> ModuleSpec:
    """A layer with the norms before its branches, as in Llama and the 7B.

    h = x + dropout(attention(norm(x)))
    y = h + dropout(feed_forward(norm(h)))
    """
    return ModuleSpec(
        module=ChameleonLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def swin_layer(norm: Spec, attention: ModuleSpec, feed_forward: ModuleSpec) -> ModuleSpec:
    """A layer with the norms after its branches, as in Swin Transformer V2 and the 34B.

    h = x + dropout(norm(attention(x)))
    y = h + dropout(norm(feed_forward(h)))
    """
    return ModuleSpec(
        module=SwinLayer,
        submodules=SwinLayerSubmodules(
            self_attention=attention,
            post_self_attn_layernorm=norm,
            self_attn_bda=get_bias_dropout_add,
            mlp=feed_forward,
            post_mlp_layernorm=norm,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def attention_spec(
    config: TransformerConfig, backend: BackendSpecProvider, qk_norm_groups: int
) -> ModuleSpec:
    """Causal self-attention, whose queries and keys are normalized if there are QK-norm groups."""
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=_qk_norm_spec(config.num_attention_heads, qk_norm_groups),
            k_layernorm=_qk_norm_spec(config.num_query_groups, qk_norm_groups),
        ),
    )


def _qk_norm_spec(heads: int, groups: int) -> Spec:
    if not groups:
        return IdentityOp
    # There may be fewer key heads than groups: then each head has its own weight.
    return ModuleSpec(HeadLayerNorm, params={"heads": heads, "groups": min(groups, heads)})


def feed_forward_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The gated feed-forward network."""
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    return ModuleSpec(MLP, submodules=linears)


class HeadLayerNorm(nn.Module):
    """QK-norm: LayerNorm over the head dimension, with a weight and bias per group of heads.

    The released checkpoints have one weight and bias per model-parallel shard, and so one per group
    of heads. Here every tensor-parallel rank holds all groups and uses the rows of its own heads,
    so the number of groups does not have to match the number of ranks. megatron-core sums the
    gradients over the ranks, as it does for its own QK-norms, because ``qk_layernorm`` is on in its
    config.

    Args:
        config: The layer's config.
        hidden_size: Head size D.
        eps: Ignored: megatron-core passes the RMSNorm's.
        heads: Number of heads over all tensor-parallel ranks.
        groups: A divisor of ``heads``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 0.0,
        *,
        heads: int,
        groups: int,
    ) -> None:
        super().__init__()
        shape, dtype = (groups, hidden_size), config.params_dtype
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.heads_per_group = heads // groups
        local_heads = heads // config.tensor_model_parallel_size
        first = parallel_state.get_tensor_model_parallel_rank() * local_heads
        self.own_heads = slice(first, first + local_heads)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normalize each head, then scale and shift it by its group's weight and bias."""
        shape = x_SBND.shape[-1:]
        if len(self.weight) == 1:  # shared by all heads: a single fused kernel takes half the time
            weight_D, bias_D = self.weight[0], self.bias[0]
            return functional.layer_norm(x_SBND, shape, weight_D, bias_D, QK_NORM_EPSILON)
        x_SBND = functional.layer_norm(x_SBND, shape, eps=QK_NORM_EPSILON)
        return x_SBND * self._of_own_heads(self.weight) + self._of_own_heads(self.bias)

    def _of_own_heads(self, parameter_GD: Tensor) -> Tensor:
        return parameter_GD.repeat_interleave(self.heads_per_group, dim=0)[self.own_heads]


class ChameleonLayer(TransformerLayer):
    """megatron-core's layer, with dropout masks that are the layer's own in every pipeline layout.

    Only sequence and context parallelism change them (``parallel/random_streams.py``).
    """

    adapter_dropout = 0.0
    """The rate of its adapters, where it has some."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and max(self.config.hidden_dropout, self.adapter_dropout) > 0:
            seed_layer(self.layer_number)
        return super().forward(*args, **kwargs)


@dataclass
class SwinLayerSubmodules(TransformerLayerSubmodules):
    """megatron-core's submodules, and the norms after the branches."""

    post_self_attn_layernorm: Spec = IdentityOp
    post_mlp_layernorm: Spec = IdentityOp


class SwinLayer(ChameleonLayer):
    """A layer with a norm between each branch and the addition to the residual stream.

    megatron-core calls ``self_attn_bda`` and ``mlp_bda`` there for bias, dropout and addition; this
    layer puts its norms in front of them.
    """

    def __init__(
        self, config: TransformerConfig, submodules: SwinLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.post_self_attn_layernorm = self._build_norm(submodules.post_self_attn_layernorm)
        self.post_mlp_layernorm = self._build_norm(submodules.post_mlp_layernorm)
        self.self_attn_bda: Callable = _norm_first(
            self.post_self_attn_layernorm, self.self_attn_bda
        )
        self.mlp_bda: Callable = _norm_first(self.post_mlp_layernorm, self.mlp_bda)

    def _build_norm(self, spec: Spec) -> nn.Module:
        return build_module(
            spec,
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )


def _norm_first(norm: nn.Module, get_bias_dropout_add: Callable) -> Callable:
    """megatron-core's factory of bias-dropout-add functions, with ``norm`` applied first."""

    def get_norm_dropout_add(training: bool, fused: bool) -> Callable:
        bias_dropout_add = get_bias_dropout_add(training, fused)

        def norm_dropout_add(
            branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
        ) -> Tensor:
            branch, bias = branch_and_bias
            branch = norm(branch if bias is None else branch + bias)
            return bias_dropout_add((branch, None), residual, probability)

        return norm_dropout_add

    return get_norm_dropout_add
