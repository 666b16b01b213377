"""What each layer does in the forward pass: norms of its output, largest attention logits.

Hooks on megatron-core's layers; nothing of the model changes. Dimension letters in tensor names:
S sequence, B batch, N heads and G key heads of this rank, n = N/G, P = B*G, D head size, Q queries
looked at.
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
"""Of each head and sequence, whose attention logits are looked at."""


@dataclass(frozen=True)
class Places:
    """Which queries' attention logits are looked at, made once for a length."""

    index_Q: Tensor
    hidden_SQ: Tensor
    """True where a key (row) comes after the query (column)."""

    @classmethod
    def of(cls, length: int, device: torch.device) -> "Places":
        """``QUERIES`` evenly spaced ones, or all where there are no more."""
        count = min(QUERIES, length)
        places = [length * (i + 1) // count - 1 for i in range(count)]
        index_Q = torch.tensor(places, device=device)
        return cls(index_Q, torch.arange(length, device=device).unsqueeze(-1) > index_Q)


class LayerMonitor:
    """Collects, for every layer of the whole model, what this rank sees of it.

    A rank fills in its own layers; sums over all ranks divided by counts over all ranks are then
    the same under every layout. Where a forward pass is recomputed, the second one counts.

    Args:
        parts: This rank's parts of the model.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        config: Any = parts[0].config
        self._count = config.num_layers
        self.reset()
        self._places: Places | None = None
        whole_sequences = config.context_parallel_size == 1
        for part in parts:
            decoder: Any = part.decoder
            for layer in decoder.layers:
                index = layer.layer_number - 1
                layer.register_forward_hook(partial(self._observe_output, index))
                if whole_sequences:
                    attention = layer.self_attention.core_attention
                    attention.register_forward_pre_hook(partial(self._observe_attention, index))

    def reset(self) -> None:
        """Begin a step."""
        # a scalar of its own for each layer: writing into one tensor takes three operations more
        self._norm_sums: dict[int, Tensor] = {}
        self._max_attention: dict[int, Tensor] = {}
        self._rows = [0] * self._count

    @property
    def norm_sums(self) -> Tensor:
        """Of each layer's output vectors, fp64; 0 where this rank has seen none."""
        return self._of_all_layers(self._norm_sums, 0.0)

    @property
    def max_attention(self) -> Tensor:
        """Each layer's largest attention logit, fp64; minus infinity where none was seen."""
        return self._of_all_layers(self._max_attention, -math.inf)

    @property
    def rows(self) -> Tensor:
        """How many vectors the sums are over, fp64."""
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

    def _observe_attention(self, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        query_SBND, key_SBGD, mask_B1SS = inputs[0].detach(), inputs[1].detach(), inputs[3]
        length = query_SBND.shape[0]
        if self._places is None or len(self._places.hidden_SQ) != length:
            self._places = Places.of(length, query_SBND.device)
        found = largest_logit(query_SBND, key_SBGD, mask_B1SS, self._places)
        _merge(self._max_attention, layer, found, torch.maximum)


def largest_logit(
    query_SBND: Tensor, key_SBGD: Tensor, mask_B1SS: Tensor | None, places: Places
) -> Tensor:
    """The largest attention logit of a few evenly spaced queries of each head and sequence.

    All logits would cost as much as attention itself; these cost Q/S of it, and are a lower bound.
    Fixed places rather than the longest query: behind a QK-norm all are about as long, so that
    rounding would choose.

    Args:
        query_SBND: As core attention takes it.
        key_SBGD: Likewise; G divides N.
        mask_B1SS: True where a query (row) must not see a key (column); None for causal attention.
        places: The queries, for this length and device.

    Returns:
        A scalar.
    """
    length, batch, groups, size = key_SBGD.shape
    query_QBGnD = query_SBND.index_select(0, places.index_Q).unflatten(2, (groups, -1))
    query_BGnQD = query_QBGnD.permute(1, 2, 3, 0, 4)
    # keys as they lie, queries transposed: half the time of what einsum makes of it on a CPU
    query_PDnQ = query_BGnQD.reshape(batch * groups, -1, size).transpose(1, 2)
    key_PSD = key_SBGD.flatten(1, 2).transpose(0, 1)
    logits_PSnQ = torch.bmm(key_PSD, query_PDnQ)
    logits_BGSnQ = logits_PSnQ.view(batch, groups, length, -1, len(places.index_Q))
    if mask_B1SS is None:
        hidden = places.hidden_SQ.unsqueeze(1)
    else:
        hidden_BSQ = mask_B1SS[:, 0].index_select(1, places.index_Q).transpose(1, 2)
        hidden = hidden_BSQ[:, None, :, None]
    return logits_BGSnQ.masked_fill_(hidden, -torch.inf).max() / math.sqrt(size)


def _merge(
    found: dict[int, Tensor],
    layer: int,
    value: Tensor,
    merge: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Take over one micro-batch's value."""
    known = found.get(layer)
    found[layer] = value if known is None else merge(known, value)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
