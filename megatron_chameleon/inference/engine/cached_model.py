"""What the decoder needs of a model: its layers, with attention that the caller computes.

There are two: transformers' layers on one device, and megatron-core's on one device or several
tensor-parallel ranks. Both give the same logits.

Letters in tensor names: R rows, S tokens, N query heads, G key heads, D width of a head, H hidden
size, V vocabulary. N and G count the heads of this rank.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, query_RNSD, key_RGSD, value_RGSD)`` stores the new keys and values of a layer
(counted from 0), and returns the attention over everything that each row may see: [R, N, S, D].
Queries and keys are already rotated to their positions."""


class CachedModel(Protocol):
    """A causal transformer whose keys and values somebody else keeps."""

    device: torch.device
    dtype: torch.dtype
    """Of keys and values."""
    num_layers: int
    num_key_heads: int
    """Of this rank."""
    head_dim: int
    context_tokens: int
    """The largest number of positions."""

    def hidden(
        self, token_ids_RS: Tensor, positions_RS: Tensor, last_R: Tensor, attend: Attend
    ) -> Tensor:
        """Run the layers.

        Args:
            token_ids_RS: int64 [R, S].
            positions_RS: int64 [R, S], the position of each token in its row, from 0.
            last_R: int64 [R], the place in S of each row's last token.
            attend: Stores keys and values, and computes attention.

        Returns:
            The head's input at the last token of each row, after the final norm: [R, H].
        """

    def logits(self, last_RH: Tensor, codes_only: bool = False) -> Tensor:
        """fp32 [R, V], whole on every rank; with ``codes_only``, [R, codes] in the order of
        ``TokenClasses.code_token_ids``."""
