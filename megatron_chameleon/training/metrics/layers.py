"""Measure each layer in the forward pass: the norm of its output, its largest attention logit.

Hooks on megatron-core's layers do it; the model itself is unchanged. Dimension letters in tensor
names: S sequence, B batch, N heads and G key heads of this rank, n = N/G, P = B*G, D head size,
Q observed queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.parallel import platform

QUERIES = 4
"""How many queries of each head and sequence have their attention logits observed."""


@dataclass(frozen=True)
class ObservedQueries:
    """The queries whose attention logits are observed; made once per sequence length."""

    index_Q: Tensor
    hidden_SQ: Tensor
    """True where a key (row) comes after the query (column)."""

    @classmethod
    def of(cls, length: int, device: torch.device) -> "ObservedQueries":
        """``QUERIES`` evenly spaced queries, or all if the sequence is shorter."""
        count = min(QUERIES, length)
        positions = [length * (i + 1) // count - 1 for i in range(count)]
        index_Q = torch.tensor(positions, device=device)
        return cls(index_Q, torch.arange(length, device=device).unsqueeze(-1) > index_Q)


class LayerMonitor:
    """Collects, for every layer of the whole model, what this rank sees of it.

    A rank fills in its own layers. The sums over all ranks, divided by the counts over all ranks,
    are then the same under every layout. If a forward pass is recomputed, the second one counts.

    Args:
        parts: This rank's parts of the model.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        config: Any = parts[0].config
        self._count = config.num_layers
        self.reset()
        self._queries: ObservedQueries | None = None
        whole_sequences = config.context_parallel_size == 1
        for part in parts:
            decoder: Any = part.decoder
            for layer in decoder.layers:
                index = layer.layer_number - 1
                layer.register_forward_hook(partial(self._observe_output, index))
                if whole_sequences:
                    attention = layer.self_attention.core_attention
                    observe = partial(self._observe_attention, index)
                    attention.register_forward_pre_hook(observe, with_kwargs=True)

    def reset(self) -> None:
        """Forget the values of the last step."""
        # One scalar per layer: writing into a common tensor would take three more operations.
        self._norm_sums: dict[int, Tensor] = {}
        self._max_attention: dict[int, Tensor] = {}
        self._rows = [0] * self._count

    @property
    def norm_sums(self) -> Tensor:
        """[layers] Sums of the norms of output vectors, fp64; 0 if this rank has seen none."""
        return self._of_all_layers(self._norm_sums, 0.0)

    @property
    def max_attention(self) -> Tensor:
        """[layers] Largest attention logits, fp64; minus infinity if none was seen."""
        return self._of_all_layers(self._max_attention, -math.inf)

    @property
    def rows(self) -> Tensor:
        """[layers] How many vectors the sums are over, fp64."""
        return torch.tensor(self._rows, dtype=torch.float64, device=platform.device())

    def _of_all_layers(self, found: dict[int, Tensor], missing: float) -> Tensor:
        none = torch.full((), missing, dtype=torch.float64, device=platform.device())
        return torch.stack([found.get(layer, none).double() for layer in range(self._count)])

    def _observe_output(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=_at_least_fp32(hidden.dtype))
        _merge(self._norm_sums, layer, norms.sum(dtype=torch.float64), torch.add)
        self._rows[layer] += norms.numel()

    def _observe_attention(
        self, layer: int, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        query_SBND, key_SBGD, position_ids_BS = inputs[0].detach(), inputs[1].detach(), None
        if (documents := named.get("packed_seq_params")) is not None:
            position_ids_BS = documents.position_ids
            if query_SBND.dim() == 3:  # packed: one sequence after the other
                query_SBND, key_SBGD = (
                    x.unflatten(0, position_ids_BS.shape).transpose(0, 1)
                    for x in (query_SBND, key_SBGD)
                )
        length = query_SBND.shape[0]
        if self._queries is None or len(self._queries.hidden_SQ) != length:
            self._queries = ObservedQueries.of(length, query_SBND.device)
        found = largest_logit(query_SBND, key_SBGD, position_ids_BS, self._queries)
        _merge(self._max_attention, layer, found, torch.maximum)


def largest_logit(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    position_ids_BS: Tensor | None,
    queries: ObservedQueries,
) -> Tensor:
    """The largest attention logit of a few evenly spaced queries of each head and sequence.

    All logits would cost as much as attention itself. These cost Q/S of it, and their maximum is a
    lower bound. The positions are fixed, because after a QK-norm all queries are about equally
    long, and rounding would decide which one is the longest.

    Args:
        query_SBND: As core attention gets it.
        key_SBGD: Likewise; G divides N.
        position_ids_BS: Counted from the start of each document that attends only to itself; None
            if attention is causal over the sequence.
        queries: For this length and device.

    Returns:
        A scalar.
    """
    length, batch, groups, size = key_SBGD.shape
    query_QBGnD = query_SBND.index_select(0, queries.index_Q).unflatten(2, (groups, -1))
    query_BGnQD = query_QBGnD.permute(1, 2, 3, 0, 4)
    # Keys as they lie in memory, queries transposed: on a CPU, half of the time of einsum.
    query_PDnQ = query_BGnQD.reshape(batch * groups, -1, size).transpose(1, 2)
    key_PSD = key_SBGD.flatten(1, 2).transpose(0, 1)
    logits_PSnQ = torch.bmm(key_PSD, query_PDnQ)
    logits_BGSnQ = logits_PSnQ.view(batch, groups, length, -1, len(queries.index_Q))
    hidden = queries.hidden_SQ.unsqueeze(1)
    if position_ids_BS is not None:
        first_BQ = queries.index_Q - position_ids_BS.index_select(1, queries.index_Q)
        key_S1 = torch.arange(length, device=first_BQ.device).unsqueeze(-1)
        hidden_BSQ = queries.hidden_SQ | (key_S1 < first_BQ.unsqueeze(1))
        hidden = hidden_BSQ[:, None, :, None]
    return logits_BGSnQ.masked_fill_(hidden, -torch.inf).max() / math.sqrt(size)


def _merge(
    found: dict[int, Tensor],
    layer: int,
    value: Tensor,
    merge: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Merge in the value of one micro-batch."""
    known = found.get(layer)
    found[layer] = value if known is None else merge(known, value)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
