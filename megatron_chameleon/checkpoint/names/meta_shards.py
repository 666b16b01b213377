"""How a tensor of Hugging Face is cut into Meta's shards, and put together again.

Meta rotates neighbouring pairs in RoPE, Hugging Face halves: rows of queries and keys change
places. Source: transformer.py of the reference code (facebookresearch/chameleon).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.errors import CheckpointError


def halves_to_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from HF's RoPE order to Meta's.

    A pair of dims that turn together is (0, D/2) in HF's order and (0, 1) in Meta's.

    Args:
        tensor: [heads * D, ...].
        head_dim: D.
    """
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of ``halves_to_pairs``."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class MetaTensor:
    """What one HF tensor is in Meta's files.

    Attributes:
        name: Its name in each shard; ``{layer}`` stands for the layer's number.
        axis: The axis along which the shards split it; None: every shard has the same tensor.
        in_pairs: Whether its rows are in RoPE order, head by head.
        norm_heads: For a QK-norm, the attribute of ``Dimensions`` that counts its heads. A shard
            stores [D], which all its heads share.
    """

    name: str
    axis: int | None = None
    in_pairs: bool = False
    norm_heads: str | None = None

    def shard_shape(self, whole: Sequence[int], dims: Dimensions, shards: int) -> tuple[int, ...]:
        """The shape of one shard's tensor.

        Args:
            whole: The shape of HF's tensor.
            dims: The model's sizes.
            shards: The number of shards.
        """
        if self.norm_heads:
            return (dims.head_dim,)
        return tuple(n // shards if i == self.axis else n for i, n in enumerate(whole))

    def to_shards(
        self, tensor: torch.Tensor, dims: Dimensions, shards: int
    ) -> tuple[torch.Tensor, ...]:
        """Each shard's part of HF's tensor; views where possible.

        Raises:
            CheckpointError: Heads of one shard have different QK-norms.
        """
        if self.norm_heads:
            by_shard = tensor.unflatten(0, (shards, -1))
            if not torch.equal(by_shard, by_shard[:, :1].expand_as(by_shard)):
                raise CheckpointError(
                    "QK-norm",
                    f"heads differ within the {shards} shards, each of which holds one QK-norm",
                    f"Write as many shards as there are groups, or {tensor.shape[0]}",
                )
            return halves_to_pairs(by_shard[:, 0].flatten(), dims.head_dim).chunk(shards)
        if self.in_pairs:
            tensor = halves_to_pairs(tensor, dims.head_dim)
        return (tensor,) * shards if self.axis is None else tensor.chunk(shards, self.axis)

    def from_shards(self, tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
        """HF's tensor, put together from every shard's; the inverse of ``to_shards``.

        Raises:
            CheckpointError: The shards differ where they should be the same.
        """
        if self.norm_heads:
            rows = pairs_to_halves(torch.cat(list(tensors)), dims.head_dim)
            rows = rows.unflatten(0, (len(tensors), dims.head_dim))
            return rows.repeat_interleave(getattr(dims, self.norm_heads) // len(tensors), dim=0)
        if self.axis is None:
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
                raise CheckpointError(
                    self.name,
                    f"differs between the {len(tensors)} shards, which should have the same",
                    "Take all shards from one checkpoint",
                )
            return tensors[0]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=self.axis)
        return pairs_to_halves(whole, dims.head_dim) if self.in_pairs else whole
