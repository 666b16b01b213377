"""Transformer Engine's attention for packed documents, computed by torch on a CPU.

megatron-core's own ``TEDotProductAttention`` runs here, over a stand-in for the class of
Transformer Engine from which it is derived. The stand-in has that class's arguments and checks of
version 2.11 (``dot_product_attention.py``), and Transformer Engine's order of tokens under context
parallelism (``context_parallel.py``). The kernels are not tested by this.
"""

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.model.backend import LocalBackend
from megatron_chameleon.training.engines import inputs


class FakeDotProductAttention(nn.Module):
    """``transformer_engine.pytorch.DotProductAttention``, as far as packed documents need it."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        **others: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and attn_mask_type == "causal" and cp_comm_type == "p2p"
        self.cp_group = cp_group

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        cu_seqlens_q_padded: Tensor | None,
        cu_seqlens_kv_padded: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
    ) -> Tensor:
        """Returns [tokens, heads * head size]."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert all(x.dim() == 3 for x in (query_layer, key_layer, value_layer))
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q == max_seqlen_kv
        if self.cp_group is None:
            assert cu_seqlens_q_padded is None  # else the host waits for a comparison of the two
            return attend(query_layer, key_layer, value_layer, lengths).flatten(1)
        size, rank = self.cp_group.size(), self.cp_group.rank()
        assert cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None
        assert torch.equal(cu_seqlens_q_padded, cu_seqlens_q)  # no padding between documents
        assert all(length % (2 * size) == 0 for length in lengths)
        places = [torch.tensor(tokens_of_rank(lengths, r, size)) for r in range(size)]
        back = torch.cat(places).argsort()
        q, k, v = (
            _Gather.apply(x, self.cp_group)[back] for x in (query_layer, key_layer, value_layer)
        )
        return attend(q, k, v, lengths)[places[rank]].flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Each document by a call of its own; T N D like its inputs."""
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    results = [
        functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for part in parts
    ]
    return torch.cat(results)


def tokens_of_rank(lengths: list[int], rank: int, size: int) -> list[int]:
    """The tokens of a context-parallel rank: two chunks of 2 x ``size`` of each document."""
    found, begin = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            found += range(begin + number * chunk, begin + (number + 1) * chunk)
        begin += length
    return found


class _Gather(torch.autograd.Function):
    """The rows of all ranks, one rank after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, x.size(0)
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.split(ctx.rows)[ctx.group.rank()], None


def attention_class() -> type:
    """megatron-core's ``TEDotProductAttention``, derived from the stand-in."""
    (definition,) = (
        node
        for node in ast.parse(inspect.getsource(transformer_engine)).body
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    )
    names = {
        **vars(transformer_engine),
        "te": SimpleNamespace(pytorch=SimpleNamespace(DotProductAttention=FakeDotProductAttention)),
        "HAVE_TE": True,
        "is_te_min_version": lambda *args, **kwargs: True,
        "get_te_version": lambda: Version("2.11.0"),
    }
    exec(compile(ast.Module([definition], []), transformer_engine.__file__, "exec"), names)
    found: Any = names["TEDotProductAttention"]
    found.cp_stream = object()  # in place of a CUDA stream
    return found


@contextmanager
def packed_documents() -> Iterator[None]:
    """Pack isolated documents as on a machine with Transformer Engine; linear layers stay local."""
    attention, before = attention_class(), (inputs.packs_documents, LocalBackend.core_attention)
    inputs.packs_documents = lambda config: config.data.reset_attention
    LocalBackend.core_attention = lambda backend: attention  # type: ignore[method-assign]
    try:
        yield
    finally:
        inputs.packs_documents, LocalBackend.core_attention = before  # type: ignore[method-assign]
