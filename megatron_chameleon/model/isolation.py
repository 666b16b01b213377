"""Isolated documents: which tokens of a micro-batch attend to each other, told by lengths.

megatron-core hands a ``PackedSeqParams`` from the model to each core attention.
``IsolatedDocuments`` is one, with what our own layers need beside it. It comes in two forms:

- packed (``thd``), for Transformer Engine: the sequences of the micro-batch have become one, and
  ``cu_seqlens`` says where each document begins. megatron-core's RoPE starts again at each.
- grouped (``sbhd``), for torch's attention: the tensors keep their shape, and core attention
  computes documents of the same length together. RoPE's angles run on over the sequence, which is
  the same: attention sees only differences of positions.

Dimension letters in tensor names: S sequence, B batch, T = S x B tokens, N heads, G key/value
heads, D head size, L tokens and C number of the documents in a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_chameleon.parallel import platform


@dataclass(frozen=True)
class DocumentGroups:
    """The documents of a micro-batch, ordered by their lengths.

    One call of attention then serves all documents of a length. A call for each document would cost
    more than its work where documents are short.
    """

    order_T: Tensor
    """Rows of an [S, B, ...] tensor, flattened, in the order of the groups; int64."""
    inverse_T: Tensor
    """What puts them back; int64."""
    shapes: list[tuple[int, int]]
    """Number and length of the documents in each group."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, batch: int) -> "DocumentGroups":
        """Group the documents of a micro-batch.

        Args:
            cu_seqlens: int32 on the CPU; see ``Batch.cu_seqlens``.
            batch: Number of sequences B.
        """
        borders = cu_seqlens.numpy().astype(np.int64)
        lengths = np.diff(borders)
        by_length = np.argsort(lengths, kind="stable")
        sorted_lengths = lengths[by_length]
        ends = np.cumsum(sorted_lengths)
        # tokens in the order of the groups, counted sequence by sequence
        shifts = borders[:-1][by_length] - (ends - sorted_lengths)
        tokens_T = np.arange(ends[-1]) + shifts.repeat(sorted_lengths)
        row, position = np.divmod(tokens_T, ends[-1] // batch)
        order_T = position * batch + row
        inverse_T = np.empty_like(order_T)
        inverse_T[order_T] = np.arange(len(order_T))
        length, count = np.unique(sorted_lengths, return_counts=True)
        shapes = list(zip(count.tolist(), length.tolist(), strict=True))
        order, inverse = (
            platform.copy_to_device(torch.from_numpy(rows)) for rows in (order_T, inverse_T)
        )
        return cls(order, inverse, shapes)

    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
    ) -> Tensor:
        """Let each document attend to itself.

        Args:
            attention: Causal attention over [C, N, L, D], [C, G, L, D] and [C, G, L, D].
            query_SBND: Queries of the micro-batch.
            key_SBGD: Keys.
            value_SBGD: Values.

        Returns:
            [S, B, N, D].
        """
        sizes = [count * length for count, length in self.shapes]
        ordered = (
            _Reorder.apply(x.flatten(0, 1), self.order_T, self.inverse_T)
            for x in (query_SBND, key_SBGD, value_SBGD)
        )
        results = []
        for shape, *group in zip(self.shapes, *(x.split(sizes) for x in ordered), strict=True):
            q_CNLD, k_CGLD, v_CGLD = (x.unflatten(0, shape).transpose(1, 2) for x in group)
            out_CNLD = attention(q_CNLD, k_CGLD, v_CGLD)
            results.append(out_CNLD.transpose(1, 2).flatten(0, 1))
        out_TND = _Reorder.apply(torch.cat(results), self.inverse_T, self.order_T)
        return out_TND.unflatten(0, query_SBND.shape[:2])


class _Reorder(torch.autograd.Function):
    """A permutation of rows, whose backward pass reads rows too, instead of adding to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


@dataclass
class IsolatedDocuments(PackedSeqParams):
    """The documents of a micro-batch, as megatron-core's layers and ours receive them."""

    position_ids: Tensor | None = None
    """[samples, seq_length] counted from the start of each document; of a packed micro-batch under
    context parallelism [1, tokens of this rank]."""
    groups: DocumentGroups | None = None
    """None if packed."""

    @property
    def own_positions(self) -> Tensor | None:
        """[T] positions by which RoPE rotates this rank's tokens, if they are not 0, 1, 2, ..."""
        assert self.position_ids is not None
        return self.position_ids.flatten() if self.groups is None else None

    @classmethod
    def grouped(cls, cu_seqlens: Tensor, position_ids: Tensor) -> "IsolatedDocuments":
        """For torch's attention.

        Args:
            cu_seqlens: int32 on the CPU; see ``Batch.cu_seqlens``.
            position_ids: [B, S] on the device.
        """
        batch, length = position_ids.shape
        return cls(
            qkv_format="sbhd",
            # RoPE takes this for the number of positions
            max_seqlen_q=length,
            max_seqlen_kv=length,
            position_ids=position_ids,
            groups=DocumentGroups.of(cu_seqlens, batch),
        )

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, longest: int, position_ids: Tensor, *, in_parts: bool
    ) -> "IsolatedDocuments":
        """For Transformer Engine.

        Args:
            cu_seqlens: [documents + 1], int32, on the device: where each document begins in the
                packed micro-batch, and its end.
            longest: Tokens of the longest document, on all ranks together.
            position_ids: [B, S] of a whole micro-batch, or [1, tokens of this rank].
            in_parts: Whether context parallelism splits the documents over ranks. Lengths must then
                be multiples of twice the number of ranks.
        """
        # A few bounds instead of many lengths: RoPE's angles are kept for each.
        bound = 1 << (longest - 1).bit_length()
        # Without padding between documents the padded lengths are the same; where they are not
        # needed, comparing them would make the host wait.
        padded = cu_seqlens if in_parts else None
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=bound,
            max_seqlen_kv=bound,
            position_ids=position_ids,
        )
