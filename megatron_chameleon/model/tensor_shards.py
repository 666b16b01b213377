"""Which part of a whole tensor belongs to a tensor-parallel rank, and the way back.

A rank holds one slice along the dimension in which megatron-core splits the tensor. The first
matrix of the feed-forward layer is the exception: it is the gate matrix stacked on the up matrix,
and a rank holds its slice of the gate rows followed by its slice of the up rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _stacked(name: str) -> int:
    """How many matrices, each of which is split by itself, are stacked in a tensor."""
    return 2 if name.endswith("linear_fc1.weight") else 1


def take_shard(whole: Tensor, name: str, dim: int, rank: int, size: int) -> Tensor:
    """The part of a whole tensor that one rank holds.

    Args:
        whole: The tensor; its size along ``dim`` is divisible by ``size``.
        name: Its name, in the whole model or on the rank.
        dim: The dimension in which it is split.
        rank: Tensor-parallel rank.
        size: Tensor-parallel size.
    """
    stacked = whole.chunk(_stacked(name), dim)
    return torch.cat([matrix.chunk(size, dim)[rank] for matrix in stacked], dim)


def join_shards(shards: Sequence[Tensor], name: str, dim: int) -> Tensor:
    """The whole tensor; the inverse of ``take_shard``.

    Args:
        shards: One of each tensor-parallel rank, in their order.
        name: As in ``take_shard``.
        dim: As in ``take_shard``.
    """
    split = [shard.chunk(_stacked(name), dim) for shard in shards]
    return torch.cat([part for matrix in zip(*split, strict=True) for part in matrix], dim)
