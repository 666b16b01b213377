"""The layers of transformers' Chameleon, with attention that the engine computes.

transformers' own ``forward`` forbids image codes and grows its cache by copying it. So each layer
is run here from its modules, in two parts: what comes before attention and what comes after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.cached_model import Attend


class TransformersLayers:
    """``CachedModel`` over ``ChameleonForConditionalGeneration``, in eval mode.

    Args:
        model: transformers' model.
        code_token_ids: int64 [codes], the token ids of image codes in ascending order.
        compiler: Backend of ``torch.compile`` for the layers of a step, or backend:mode. None
            leaves them uncompiled. Prompts are always read by uncompiled layers, because almost
            each has another length.
    """

    def __init__(self, model: Any, code_token_ids: Tensor, compiler: str | None = None) -> None:
        config = model.config
        self._transformer, self._head = model.model, model.lm_head
        self._layers = list(model.model.layers)
        embedding = model.model.embed_tokens.weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self.num_layers: int = len(self._layers)
        self.num_key_heads: int = config.num_key_value_heads
        self.head_dim: int = config.hidden_size // config.num_attention_heads
        self.context_tokens: int = config.max_position_embeddings
        before, after = (_before_swin, _after_swin) if config.swin_norm else (_before, _after)
        self._parts = (before, after)
        self._step_parts = tuple(_compiled(part, compiler) for part in self._parts)
        positions_1C = torch.arange(self.context_tokens, device=self.device)[None]
        with torch.inference_mode():
            cos_1CD, sin_1CD = model.model.rotary_emb(embedding[:1], positions_1C)
        self._cos_CD, self._sin_CD = cos_1CD[0], sin_1CD[0]
        self._code_head_VH = _rows_of(model.lm_head.weight, code_token_ids)

    def hidden(
        self, token_ids_RS: Tensor, positions_RS: Tensor, last_R: Tensor, attend: Attend
    ) -> Tensor:
        """As ``CachedModel.hidden``."""
        rows, tokens = token_ids_RS.shape
        before, after = self._step_parts if tokens == 1 else self._parts
        hidden_RSH = self._transformer.embed_tokens(token_ids_RS)
        positions = positions_RS.reshape(-1)
        shape = (rows, 1, tokens, self.head_dim)  # the same for all heads
        cos_R1SD = self._cos_CD.index_select(0, positions).view(shape)
        sin_R1SD = self._sin_CD.index_select(0, positions).view(shape)
        for number, layer in enumerate(self._layers):
            query_RNSD, key_RGSD, value_RGSD = before(layer, hidden_RSH, cos_R1SD, sin_R1SD)
            attention_RNSD = attend(number, query_RNSD, key_RGSD, value_RGSD)
            hidden_RSH = after(layer, hidden_RSH, attention_RNSD)
        if tokens > 1:
            index_R11 = last_R[:, None, None]
            hidden_RSH = hidden_RSH.take_along_dim(index_R11, dim=1)
        return self._transformer.norm(hidden_RSH[:, 0])

    def logits(self, last_RH: Tensor, codes_only: bool = False) -> Tensor:
        """As ``CachedModel.logits``."""
        if codes_only:
            return torch.nn.functional.linear(last_RH, self._code_head_VH).float()
        return self._head(last_RH).float()


Part = Callable[..., Any]


def _compiled(part: Part, compiler: str | None) -> Part:
    """The function compiled, if there is a compiler. The layer is an argument of the function, so
    one compilation serves all layers."""
    if compiler is None:
        return part
    backend, _, mode = compiler.partition(":")
    return torch.compile(part, backend=backend, mode=mode or None, fullgraph=True)


def _before(layer: Any, hidden_RSH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return _before_swin(layer, layer.input_layernorm(hidden_RSH), cos, sin)


def _before_swin(
    layer: Any, input_RSH: Tensor, cos_R1SD: Tensor, sin_R1SD: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys and values of a layer. Its norms come after the parts in the Swin order."""
    attention = layer.self_attn
    rows, tokens, _ = input_RSH.shape
    heads, groups, dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    # transformers' norms of queries and keys expect rows and tokens as one dimension
    query = attention.q_norm(attention.q_proj(input_RSH).view(-1, heads, dim))
    key = attention.k_norm(attention.k_proj(input_RSH).view(-1, groups, dim))
    query_RNSD = query.view(rows, tokens, heads, dim).transpose(1, 2)
    key_RGSD = key.view(rows, tokens, groups, dim).transpose(1, 2)
    value_RGSD = attention.v_proj(input_RSH).view(rows, tokens, groups, dim).transpose(1, 2)
    return (
        _rotated(query_RNSD, cos_R1SD, sin_R1SD),
        _rotated(key_RGSD, cos_R1SD, sin_R1SD),
        value_RGSD,
    )


def _rotated(heads_RNSD: Tensor, cos_R1SD: Tensor, sin_R1SD: Tensor) -> Tensor:
    first, second = heads_RNSD.chunk(2, dim=-1)
    return heads_RNSD * cos_R1SD + torch.cat((-second, first), dim=-1) * sin_R1SD


def _after(layer: Any, hidden_RSH: Tensor, attention_RNSD: Tensor) -> Tensor:
    hidden_RSH = hidden_RSH + layer.self_attn.o_proj(_joined(attention_RNSD))
    return hidden_RSH + layer.mlp(layer.post_attention_layernorm(hidden_RSH))


def _after_swin(layer: Any, hidden_RSH: Tensor, attention_RNSD: Tensor) -> Tensor:
    attended_RSH = layer.self_attn.o_proj(_joined(attention_RNSD))
    hidden_RSH = hidden_RSH + layer.input_layernorm(attended_RSH)
    return hidden_RSH + layer.post_attention_layernorm(layer.mlp(hidden_RSH))


def _joined(attention_RNSD: Tensor) -> Tensor:
    rows, _, tokens, _ = attention_RNSD.shape
    return attention_RNSD.transpose(1, 2).reshape(rows, tokens, -1)


def _rows_of(weight_VH: Tensor, ids: Tensor) -> Tensor:
    """Rows of the head's weights; a view if the ids are consecutive, as the paper's are."""
    first, count = (int(ids[0]), len(ids)) if len(ids) else (0, 0)
    if count and int(ids[-1]) - first + 1 == count:
        return weight_VH[first : first + count]
    return weight_VH.index_select(0, ids)
