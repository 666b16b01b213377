"""The layers of transformers' Chameleon, with attention that the engine computes.

transformers' own ``forward`` forbids image codes and grows its cache by copying it. So each layer
is run here from its weights, in two parts: what comes before attention and what comes after it. For
a small model, the time of a step is the number of operations. So the projections of queries, keys
and values are one product, those of the MLP too, and the heads of queries and keys are normed and
rotated together. The joined weights take the place of the model's own, which become views of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

from megatron_chameleon.inference.engine.cached_model import Attend

QK_NORM_EPSILON = 1e-5
"""As in transformers' ``ChameleonLayerNorm``."""


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer. J joins query and key heads, F is twice the MLP's width."""

    attention_norm_H: Tensor
    mlp_norm_H: Tensor
    epsilon: float
    qkv: tuple[Tensor, Tensor | None]
    """Weight and bias; so are the following ones."""
    qk_norm_JD: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    activation: Callable[[Tensor], Tensor]
    query_heads: int
    key_heads: int

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm, attention.k_norm)
        return cls(
            attention_norm_H=layer.input_layernorm.weight,
            mlp_norm_H=layer.post_attention_layernorm.weight,
            epsilon=layer.input_layernorm.variance_epsilon,
            qkv=_joined_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
            qk_norm_JD=(
                torch.cat([norm.weight for norm in norms]),
                torch.cat([norm.bias for norm in norms]),
            ),
            output=(attention.o_proj.weight, attention.o_proj.bias),
            gate_up=_joined_linear([mlp.gate_proj, mlp.up_proj]),
            down=(mlp.down_proj.weight, mlp.down_proj.bias),
            activation=mlp.act_fn,
            query_heads=attention.num_heads,
            key_heads=attention.num_key_value_heads,
        )


def _joined_linear(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear modules one below the other, as the modules' own memory."""
    found: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        if parts[0] is None:
            found.append(None)
            continue
        whole = torch.cat([part.data for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
        found.append(whole)
    weight, bias = found
    assert weight is not None
    return weight, bias


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
        with torch.no_grad():
            self._layers = [_Layer.of(layer) for layer in model.model.layers]
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
        shape = (rows, tokens, 1, self.head_dim)  # the same for all heads
        cos_RS1D = self._cos_CD.index_select(0, positions).view(shape)
        sin_RS1D = self._sin_CD.index_select(0, positions).view(shape)
        for number, layer in enumerate(self._layers):
            query_RNSD, key_RGSD, value_RGSD = before(layer, hidden_RSH, cos_RS1D, sin_RS1D)
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


def _before(layer: _Layer, hidden_RSH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return _before_swin(layer, _normed(hidden_RSH, layer.attention_norm_H, layer), cos, sin)


def _before_swin(
    layer: _Layer, input_RSH: Tensor, cos_RS1D: Tensor, sin_RS1D: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys and values of a layer. Its norms come after the parts in the Swin order."""
    dim, queries = cos_RS1D.shape[-1], layer.query_heads
    joined = queries + layer.key_heads
    heads_RSHD = linear(input_RSH, *layer.qkv).unflatten(-1, (-1, dim))
    normed_RSJD = layer_norm(heads_RSHD[:, :, :joined], (dim,), eps=QK_NORM_EPSILON)
    weight_JD, bias_JD = layer.qk_norm_JD
    normed_RSJD = normed_RSJD * weight_JD + bias_JD
    first, second = normed_RSJD.chunk(2, dim=-1)
    turned_RSJD = torch.cat((-second, first), dim=-1)
    rotated_RJSD = (normed_RSJD * cos_RS1D + turned_RSJD * sin_RS1D).transpose(1, 2)
    value_RGSD = heads_RSHD[:, :, joined:].transpose(1, 2)
    return rotated_RJSD[:, :queries], rotated_RJSD[:, queries:], value_RGSD


def _after(layer: _Layer, hidden_RSH: Tensor, attention_RNSD: Tensor) -> Tensor:
    hidden_RSH = hidden_RSH + linear(_joined(attention_RNSD), *layer.output)
    return hidden_RSH + _mlp(layer, _normed(hidden_RSH, layer.mlp_norm_H, layer))


def _after_swin(layer: _Layer, hidden_RSH: Tensor, attention_RNSD: Tensor) -> Tensor:
    attended_RSH = linear(_joined(attention_RNSD), *layer.output)
    hidden_RSH = hidden_RSH + _normed(attended_RSH, layer.attention_norm_H, layer)
    return hidden_RSH + _normed(_mlp(layer, hidden_RSH), layer.mlp_norm_H, layer)


def _mlp(layer: _Layer, input_RSH: Tensor) -> Tensor:
    gate, up = linear(input_RSH, *layer.gate_up).chunk(2, dim=-1)
    return linear(layer.activation(gate) * up, *layer.down)


def _normed(hidden_RSH: Tensor, weight_H: Tensor, layer: _Layer) -> Tensor:
    return rms_norm(hidden_RSH, weight_H.shape, weight_H, layer.epsilon)


def _joined(attention_RNSD: Tensor) -> Tensor:
    rows, _, tokens, _ = attention_RNSD.shape
    return attention_RNSD.transpose(1, 2).reshape(rows, tokens, -1)


def _rows_of(weight_VH: Tensor, ids: Tensor) -> Tensor:
    """Rows of the head's weights; a view if the ids are consecutive, as the paper's are."""
    first, count = (int(ids[0]), len(ids)) if len(ids) else (0, 0)
    if count and int(ids[-1]) - first + 1 == count:
        return weight_VH[first : first + count]
    return weight_VH.index_select(0, ids)
