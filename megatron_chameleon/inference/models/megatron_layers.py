"""The trained model itself as a ``CachedModel``, on one device or on several tensor-parallel ranks.

    with MegatronLayers.borrowed(model, code_token_ids, vocab_size) as layers:
        ...  # decode; afterwards the model trains on as if nothing had happened

Everything but attention looks at one token at a time. So the tokens of all rows go through
megatron-core's layers as one sequence of a batch of one, with the angles of each token's own
position, and only core attention is another one while the model is borrowed. That also suits
sequence parallelism, which splits this sequence, and the fused rotary embedding.

Letters in tensor names: those of ``engine/cached_model.py``, and T = R * S tokens, T' the tokens
with padding, C image codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.inference.engine.cached_model import Attend
from megatron_chameleon.model.chameleon import ChameleonModel
from megatron_chameleon.model.fp8 import kept_fp8_scales
from megatron_chameleon.model.fp8_linear import without_fp8


class MegatronLayers:
    """``CachedModel`` over a whole ``ChameleonModel``: one pipeline stage, any tensor parallelism.

    Every tensor-parallel rank makes the same calls, and gets the same logits. With context
    parallelism, the ranks of one context rank are enough, because each holds the whole model. A
    model that is trained in FP8 decodes in its own dtype, as its exported weights do.

    Make one with ``borrowed`` if the model is to be used otherwise too.

    Args:
        model: In eval mode.
        code_token_ids: int64 [codes], the token ids of image codes.
        vocab_size: Number of tokens in the vocabulary. The model may have more rows, which are
            padding.
    """

    def __init__(self, model: ChameleonModel, code_token_ids: Tensor, vocab_size: int) -> None:
        config = model.config
        assert model.pre_process and model.post_process, "a model of one pipeline stage"
        assert config.kv_channels is not None
        self._model = model
        self._layers: list[Any] = list(model.decoder.layers)
        self._attention = [_CachedAttention(number) for number in range(len(self._layers))]
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._vocab_size = vocab_size
        # Sequence parallelism splits the tokens into equal parts.
        self._multiple = self._group.size() if config.sequence_parallel else 1
        weight_VH = model.output_layer.weight
        self.device: torch.device = weight_VH.device
        self.dtype: torch.dtype = weight_VH.dtype
        self.num_layers = len(self._layers)
        self.num_key_heads: int = self._layers[0].self_attention.num_query_groups_per_partition
        self.head_dim: int = config.kv_channels
        self.context_tokens: int = model.max_sequence_length
        self._code_head_CH = self._gather_head_rows(
            weight_VH.detach(), code_token_ids.to(self.device)
        )

    @classmethod
    @contextmanager
    def borrowed(
        cls, model: ChameleonModel, code_token_ids: Tensor, vocab_size: int
    ) -> Iterator["MegatronLayers"]:
        """Use a model for a while, and leave it as it was: its mode, attention and FP8 state."""
        modes = [(module, module.training) for module in model.modules()]
        own = [layer.self_attention.core_attention for layer in model.decoder.layers]
        model.eval()
        try:
            with kept_fp8_scales([model]), without_fp8(model):
                layers = cls(model, code_token_ids, vocab_size)
                layers._take_over_attention()
                yield layers
        finally:
            for layer, attention in zip(model.decoder.layers, own, strict=True):
                layer.self_attention.core_attention = attention
            for module, training in modes:
                module.training = training

    def _take_over_attention(self) -> None:
        for layer, attention in zip(self._layers, self._attention, strict=True):
            layer.self_attention.core_attention = attention

    @torch.inference_mode()
    def hidden(
        self, token_ids_RS: Tensor, positions_RS: Tensor, last_R: Tensor, attend: Attend
    ) -> Tensor:
        """Run the layers; see ``CachedModel``."""
        rows, tokens = token_ids_RS.shape
        padding = -(rows * tokens) % self._multiple
        ids_1T, positions_1T = (
            functional.pad(x_RS.reshape(1, -1), (0, padding))
            for x_RS in (token_ids_RS, positions_RS)
        )
        angles_TD = positions_1T[0, :, None] * self._model.rotary_pos_emb.inv_freq
        angles_T11D = torch.cat((angles_TD, angles_TD), dim=-1)[:, None, None]
        for attention in self._attention:
            attention.begin(rows, tokens, attend)
        hidden_T1H = self._model.embedding(ids_1T, positions_1T)
        for layer in self._layers:
            hidden_T1H, _ = layer(hidden_T1H, attention_mask=None, rotary_pos_emb=angles_T11D)
        if self._multiple > 1:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=self._group)
        first_R = torch.arange(0, rows * tokens, tokens, device=self.device)
        return self._model.decoder.final_layernorm(hidden_T1H[first_R + last_R])[:, 0]

    @torch.inference_mode()
    def logits(self, last_RH: Tensor, codes_only: bool = False) -> Tensor:
        """Logits on every rank; see ``CachedModel``."""
        if codes_only:
            return functional.linear(last_RH, self._code_head_CH).float()
        part_RV = functional.linear(last_RH, self._model.output_layer.weight)
        whole_RV = gather_from_tensor_model_parallel_region(part_RV, group=self._group)
        return whole_RV[:, : self._vocab_size].float()

    @torch.no_grad()
    def _gather_head_rows(self, weight_VH: Tensor, ids_C: Tensor) -> Tensor:
        """Rows of the output layer of all ranks.

        They are few, and a step within an image then needs no gathering of its logits.
        """
        first = self._group.rank() * len(weight_VH)
        local_C = ids_C - first
        own_C = (local_C >= 0) & (local_C < len(weight_VH))
        rows_CH = weight_VH[local_C.clamp(0, len(weight_VH) - 1)] * own_C[:, None]
        if self._group.size() > 1:
            torch.distributed.all_reduce(rows_CH, group=self._group)  # adds zeros only: exact
        return rows_CH


class _CachedAttention(nn.Module):
    """Stands in for the core attention of a layer, and hands the work to an ``Attend``."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def begin(self, rows: int, tokens: int, attend: Attend) -> None:
        """Expect ``rows`` x ``tokens`` tokens in the next call; those behind them are padding."""
        self._shape, self._attend = (rows, tokens), attend

    def forward(
        self, query_T1ND: Tensor, key_T1GD: Tensor, value_T1GD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        count = self._shape[0] * self._shape[1]
        query_RNSD, key_RGSD, value_RGSD = (
            x_T1ND[:count, 0].unflatten(0, self._shape).transpose(1, 2)
            for x_T1ND in (query_T1ND, key_T1GD, value_T1GD)
        )
        result_RNSD = self._attend(self._layer, query_RNSD, key_RGSD, value_RGSD)
        result_TE = result_RNSD.transpose(1, 2).reshape(count, 1, -1)
        return functional.pad(result_TE, (0, 0, 0, 0, 0, len(query_T1ND) - count))
