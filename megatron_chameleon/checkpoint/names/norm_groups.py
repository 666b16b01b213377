"""How many groups of heads share a QK-norm, found from the tensors themselves."""

from collections.abc import Iterable
from typing import Any

import torch


def norm_groups(per_head: Iterable[torch.Tensor]) -> int:
    """The smallest number of groups in which neighbouring heads share their QK-norm.

    Args:
        per_head: HF's weights and biases of all layers, each [heads, D].

    Returns:
        A divisor of the number of heads: 1 if all heads are equal, ``heads`` if no neighbours are.
    """
    tensors = list(per_head)
    heads = tensors[0].shape[0]
    for groups in range(1, heads):
        if heads % groups:
            continue
        blocks = (tensor.unflatten(0, (groups, -1)) for tensor in tensors)
        if all(torch.equal(block, block[:, :1].expand_as(block)) for block in blocks):
            return groups
    return heads


def common_norm_groups(q_groups: int, k_groups: int, heads: int, key_heads: int) -> int:
    """The smallest ``qk_norm_groups`` that gives both queries and keys enough groups.

    A model with n groups has n for its queries and min(n, key heads) for its keys. Groups may be
    split further without changing what the model computes.

    Args:
        q_groups: Groups of query heads, a divisor of ``heads``.
        k_groups: Groups of key heads, a divisor of ``key_heads``.
        heads: Attention heads.
        key_heads: Key heads, a divisor of ``heads``.
    """
    for groups in range(q_groups, heads, q_groups):
        of_keys = min(groups, key_heads)
        if heads % groups == 0 and of_keys % k_groups == 0 and key_heads % of_keys == 0:
            return groups
    return heads


def norm_settings(
    recorded: Any, *, q_groups: int, k_groups: int, heads: int, key_heads: int
) -> tuple[int, int, int]:
    """``qk_norm_groups`` of a model, and the groups of its query and key norms.

    Args:
        recorded: ``qk_norm_groups`` of the config it was exported with; None where unknown. It
            counts if the tensors are equal within its groups: a group count may be larger than the
            tensors need.
        q_groups: The fewest groups in which the query norms of all layers are equal.
        k_groups: The same for the keys.
        heads: Attention heads.
        key_heads: Key heads.
    """
    groups = common_norm_groups(q_groups, k_groups, heads, key_heads)
    if isinstance(recorded, int) and recorded > 0 and heads % recorded == 0:
        of_keys = min(recorded, key_heads)
        if recorded % q_groups == 0 and key_heads % of_keys == 0 and of_keys % k_groups == 0:
            groups = recorded
    return groups, groups, min(groups, key_heads)
