"""What each layer does in the forward pass: norms of its output, largest attention logits.

Hooks on megatron-core's layers; nothing of the model changes. Dimension letters in tensor names:
S sequence, B batch, N heads and G key heads of this rank, D head size.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.parallel import platform

QUERIES = 4
"""Of each head and sequence, whose attention logits are looked at."""


class LayerMonitor:
    """Collects, for every layer of the whole model, what this rank sees of it.

    A rank fills in its own layers; sums over all ranks divided by counts over all ranks are then
    the same under every layout. Where a forward pass is recomputed, the second one counts.

    Args:
        parts: This rank's parts of the model.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        config: Any = parts[0].config
        layers, device = config.num_layers, platform.device()
        self.norm_sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self.max_attention = torch.full((layers,), -torch.inf, dtype=torch.float64, device=device)
        self._rows = [0] * layers
        self._whole_sequences = config.context_parallel_size == 1
        for part in parts:
            decoder: Any = part.decoder
            for layer in decoder.layers:
                index = layer.layer_number - 1
                layer.register_forward_hook(partial(self._observe_output, index))
                if self._whole_sequences:
                    attention = layer.self_attention.core_attention
                    attention.register_forward_pre_hook(partial(self._observe_attention, index))

    @property
    def rows(self) -> Tensor:
        """How many vectors the sums are over."""
        device = self.norm_sums.device
        return torch.tensor(self._rows, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Begin a step."""
        self.norm_sums.zero_()
        self.max_attention.fill_(-torch.inf)
        self._rows = [0] * len(self._rows)

    def _observe_output(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=_at_least_fp32(hidden.dtype))
        self.norm_sums[layer] += norms.sum()
        self._rows[layer] += norms.numel()

    def _observe_attention(self, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        query_SBND, key_SBGD, mask_B1SS = inputs[0].detach(), inputs[1].detach(), inputs[3]
        found = largest_logit(query_SBND, key_SBGD, mask_B1SS)
        self.max_attention[layer] = torch.maximum(self.max_attention[layer], found.double())


def largest_logit(query_SBND: Tensor, key_SBGD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
    """The largest attention logit of ``QUERIES`` evenly spaced queries of each head and sequence.

    All logits would cost as much as attention itself; these cost 4/S of it, and are a lower bound.
    Fixed places rather than the longest query: behind a QK-norm all are about as long, so that
    rounding would choose.

    Args:
        query_SBND: As core attention takes it.
        key_SBGD: Likewise; G divides N.
        mask_B1SS: True where a query (row) must not see a key (column); None for causal attention.

    Returns:
        A scalar.
    """
    length, _, heads, size = query_SBND.shape
    groups = key_SBGD.shape[2]
    count = min(QUERIES, length)
    places = [length * (i + 1) // count - 1 for i in range(count)]
    query_QBGnD = query_SBND[places].unflatten(2, (groups, heads // groups))
    logits_BGnQS = torch.einsum("qbgnd,sbgd->bgnqs", query_QBGnD, key_SBGD)
    logits_BNQS = logits_BGnQS.flatten(1, 2)
    if mask_B1SS is None:
        positions_S = torch.arange(length, device=query_SBND.device)
        hidden_QS = positions_S > positions_S[places].unsqueeze(-1)
        logits_BNQS = logits_BNQS.masked_fill(hidden_QS, -torch.inf)
    else:
        logits_BNQS = logits_BNQS.masked_fill(mask_B1SS[:, :, places], -torch.inf)
    return logits_BNQS.max() / math.sqrt(size)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
