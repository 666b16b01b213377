"""How the tensors of megatron-core become those of Hugging Face, and back.

Megatron-core fuses query, key and value into one tensor, and the gate and up projections into
another. Both sides rotate halves in RoPE, so no rows change places.

Shape letters: H hidden, A attention heads, G query groups, D head_dim, N groups of heads that share
a QK-norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide every tensor's shape, and the norm order, which decides two names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    q_norm_groups: int
    k_norm_groups: int
    norm_order: str = "pre"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def of(
        cls, model: ModelConfig, vocab_size: int, q_norm_groups: int, k_norm_groups: int
    ) -> "Dimensions":
        """The sizes of a config; the group counts come from the tensors, never from the config."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            vocab_size=vocab_size,
            q_norm_groups=q_norm_groups,
            k_norm_groups=k_norm_groups,
            norm_order=model.norm_order,
        )


@dataclass(frozen=True)
class TensorMapping:
    """How one megatron-core tensor becomes one or more HF tensors, and back.

    Attributes:
        shape: The megatron-core shape of one layer, without vocabulary padding.
        split: Megatron-core's tensor to HF's.
        join: The inverse of ``split``.
    """

    shape: Callable[[Dimensions], tuple[int, ...]]
    split: Callable[[torch.Tensor, Dimensions], tuple[torch.Tensor, ...]]
    join: Callable[[Sequence[torch.Tensor], Dimensions], torch.Tensor]


def same_on_both_sides(shape: Callable[[Dimensions], tuple[int, ...]]) -> TensorMapping:
    """The mapping of a tensor that both sides store alike."""
    return TensorMapping(shape, lambda tensor, _: (tensor,), lambda tensors, _: tensors[0])


def grouped_norm(groups: str, heads: str) -> TensorMapping:
    """[N, D], one row for each group of heads, becomes [heads, D].

    Args:
        groups: The attribute of ``Dimensions`` that counts the groups.
        heads: The attribute of ``Dimensions`` that counts the heads.
    """

    def split(tensor: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
        return (tensor.repeat_interleave(getattr(dims, heads) // getattr(dims, groups), dim=0),)

    def join(tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
        blocks = tensors[0].unflatten(0, (getattr(dims, groups), -1))
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            raise CheckpointError(
                "QK-norm",
                f"heads differ within the {getattr(dims, groups)} groups they should share",
                "Report this bug",
            )
        return blocks[:, 0].contiguous()

    return TensorMapping(lambda dims: (getattr(dims, groups), dims.head_dim), split, join)


def _split_qkv(tensor: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """[(A + 2G) * D, H] -> q [A * D, H], k [G * D, H], v [G * D, H].

    The fused tensor holds, for each query group in turn, its query heads, its key and its value.
    """
    queries = dims.num_attention_heads // dims.num_query_groups
    by_group = tensor.unflatten(0, (dims.num_query_groups, (queries + 2), dims.head_dim))
    parts = by_group.split([queries, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def _join_qkv(tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
    parts = [tensor.unflatten(0, (dims.num_query_groups, -1, dims.head_dim)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


VOCABULARY = same_on_both_sides(lambda dims: (dims.vocab_size, dims.hidden_size))
HIDDEN_NORM = same_on_both_sides(lambda dims: (dims.hidden_size,))
FUSED_QKV = TensorMapping(
    lambda dims: (
        (dims.num_attention_heads + 2 * dims.num_query_groups) * dims.head_dim,
        dims.hidden_size,
    ),
    _split_qkv,
    _join_qkv,
)
ATTENTION_OUTPUT = same_on_both_sides(
    lambda dims: (dims.hidden_size, dims.num_attention_heads * dims.head_dim)
)
Q_NORM_GROUPS = grouped_norm("q_norm_groups", "num_attention_heads")
K_NORM_GROUPS = grouped_norm("k_norm_groups", "num_query_groups")
GATE_UP = TensorMapping(
    lambda dims: (2 * dims.ffn_hidden_size, dims.hidden_size),
    lambda tensor, _: tuple(tensor.chunk(2)),
    lambda tensors, _: torch.cat(list(tensors)),
)
DOWN = same_on_both_sides(lambda dims: (dims.hidden_size, dims.ffn_hidden_size))
