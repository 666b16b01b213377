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
    """The largest attention logit of the longest query of each head and sequence.

    All logits would cost as much as attention itself; those of one query of S cost 1/S of it, and
    where logits grow it is among them. It is a lower bound of the largest of all.

    Args:
        query_SBND: As core attention takes it.
        key_SBGD: Likewise; G divides N.
        mask_B1SS: True where a query (row) must not see a key (column); None for causal attention.

    Returns:
        A scalar.
    """
    lengths_SBN = torch.linalg.vector_norm(query_SBND, dim=-1)
    place_BN = lengths_SBN.argmax(dim=0)
    batch, heads = place_BN.shape
    rows_B1 = torch.arange(batch, device=place_BN.device).unsqueeze(1)
    longest_BND = query_SBND[place_BN, rows_B1, torch.arange(heads, device=place_BN.device)]
    groups, size = key_SBGD.shape[2:]
    longest_BGnD = longest_BND.unflatten(1, (groups, heads // groups))
    logits_BGnS = torch.einsum("bgnd,sbgd->bgns", longest_BGnD, key_SBGD)
    logits_BNS = logits_BGnS.flatten(1, 2)
    if mask_B1SS is None:
        columns_S = torch.arange(key_SBGD.shape[0], device=place_BN.device)
        hidden_BNS = columns_S > place_BN.unsqueeze(-1)
    else:
        hidden_BNS = mask_B1SS[rows_B1, 0, place_BN]
    return logits_BNS.masked_fill(hidden_BNS, -torch.inf).max() / math.sqrt(size)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
