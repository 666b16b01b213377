"""Chameleon's transformer, made of vLLM's parallel layers; images are ordinary token ids to it.

It is Llama but for two things: a LayerNorm of each head's queries and keys before the rotary
embedding, and the Swin order, in which a norm follows attention and MLP.

Letters in tensor names: T tokens, H heads of this rank, D width of a head, Q their product.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

EPSILON = 1e-5
"""Of the QK-norm. transformers has it in its code too, not in the config."""


class HeadNorm(nn.Module):
    """LayerNorm of each head, with weights of its own.

    Args:
        heads: Number of heads over all ranks.
        heads_here: Number of heads of this rank.
        head_dim: Width of a head.
    """

    def __init__(self, heads: int, heads_here: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.heads_here = heads, heads_here
        self.weight = nn.Parameter(torch.ones(heads_here, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads_here, head_dim))
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self._load})

    def _load(self, parameter: Tensor, loaded: Tensor) -> None:
        # with fewer key heads than ranks, neighbouring ranks have copies of the same one
        copies = max(1, get_tensor_model_parallel_world_size() * self.heads_here // self.heads)
        first = get_tensor_model_parallel_rank() // copies * self.heads_here
        parameter.data.copy_(loaded[first : first + self.heads_here])

    def forward(self, x_TQ: Tensor) -> Tensor:
        x_THD = x_TQ.unflatten(-1, self.weight.shape)
        x_THD = layer_norm(x_THD, x_THD.shape[-1:], eps=EPSILON) * self.weight + self.bias
        return x_THD.flatten(-2)


class ChameleonAttention(LlamaAttention):
    """Llama's attention with QK-norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_norm = HeadNorm(self.total_num_heads, self.num_heads, self.head_dim)
        self.k_norm = HeadNorm(self.total_num_kv_heads, self.num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q_TQ, k_TQ, v_TQ = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q_TQ, k_TQ = self.rotary_emb(positions, self.q_norm(q_TQ), self.k_norm(k_TQ))
        output, _ = self.o_proj(self.attn(q_TQ, k_TQ, v_TQ))
        return output


class ChameleonLayer(LlamaDecoderLayer):
    """As in ``LlamaModel``, input and output are two tensors whose sum is the residual stream."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=ChameleonAttention)
        self.swin = bool(vllm_config.model_config.hf_config.swin_norm)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Two of [T, hidden] to two of [T, hidden]."""
        if not self.swin:
            return super().forward(positions, hidden_states, residual)
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.input_layernorm(self.self_attn(positions, stream))
        return self.post_attention_layernorm(self.mlp(stream)), stream


class ChameleonForConditionalGeneration(LlamaForCausalLM):
    """What vLLM builds for an exported folder."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ChameleonLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load an export without its image tokenizer, which the server has."""
        mapper = WeightsMapper(orig_to_new_prefix={"model.vqmodel.": None})
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
