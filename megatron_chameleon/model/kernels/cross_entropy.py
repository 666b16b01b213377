"""The loss in two passes over the logits, each of them one kernel.

Forward reads the logits once and keeps three numbers per row. Backward reads them once and
overwrites them with their gradient. Nothing of the logits' size is allocated, so the least possible
traffic is three times their bytes. Source of the online softmax: Milakov and Gimelshein, arXiv
1805.02867.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
"""The widest load of one thread."""
STATISTICS_LANES, STATISTICS_WARPS = 1024, 8
"""Four loads of a thread in flight, 16 KiB per program; six programs fit on a multiprocessor."""
GRADIENT_BYTES, GRADIENT_WARPS = 8192, 4
"""Bytes of the logits for each program."""


@triton.jit
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger one, or NaN if either is NaN, as in torch; ``tl.max`` would drop the NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def statistics_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    row_stride: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One program per row. Each of LANES keeps a maximum and a sum of its own.

    A lane takes VECTOR neighbouring values at a time, all in one thread. So threads communicate
    only at the end of the row, and not within the loop.
    """
    row = tl.program_id(0).to(tl.int64)  # row x stride exceeds int32 from 32,768 x 65,536 on
    logits_ptr += row * row_stride
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.full([LANES], 0.0, tl.float32)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in range(0, columns, LANES * VECTOR):
        at = start + offsets
        if MASKED:
            x = tl.load(logits_ptr + at, mask=at < columns, other=float("-inf"))
        else:
            x = tl.load(logits_ptr + at)
        x = x.to(tl.float32)
        new_largest = _larger(largest, tl.reduce(x, 1, _larger))
        # If a lane has only seen -inf: (-inf) - (-inf) is NaN, and (-inf) - 0 is not.
        shifts = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shifts) + tl.sum(tl.exp(x - shifts[:, None]), axis=1)
        largest = new_largest
    max_logit = tl.reduce(largest, 0, _larger)
    shift = tl.where(max_logit == float("-inf"), 0.0, max_logit)  # finite on another rank
    sum_exp = tl.sum(total * tl.exp(largest - shift), axis=0)

    label = tl.load(labels_ptr + row) - first
    here = (label >= 0) & (label < columns)
    label_logit = tl.load(logits_ptr + label, mask=here, other=0.0).to(tl.float32)
    tl.store(statistics_ptr + row, max_logit)
    tl.store(statistics_ptr + tokens + row, sum_exp)
    tl.store(statistics_ptr + 2 * tokens + row, label_logit)


@triton.jit
def gradient_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    max_logit_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    at_label_ptr: tl.tensor,
    row_stride: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One program per block of a row: exp(x - max) x factor, minus ``at_label`` at the label."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks) * BLOCK
    logits_ptr += row * row_stride
    at = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + at, mask=at < columns) if MASKED else tl.load(logits_ptr + at)
    gradient = tl.exp(x.to(tl.float32) - tl.load(max_logit_ptr + row)) * tl.load(factor_ptr + row)
    label = (tl.load(labels_ptr + row) - first).to(tl.int32)
    if (label >= start) & (label < start + BLOCK):  # true in one block of a row
        gradient = tl.where(at == label, gradient - tl.load(at_label_ptr + row), gradient)
    gradient = gradient.to(logits_ptr.dtype.element_ty)
    if MASKED:
        tl.store(logits_ptr + at, gradient, mask=at < columns)
    else:
        tl.store(logits_ptr + at, gradient)


def row_statistics(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """The largest logit, the sum of exp(logit - largest) and the label's logit of each row.

    Args:
        logits: [tokens, columns] of one rank, bf16, fp16 or fp32, with a stride of 1 in the rows.
        labels: [tokens] int64 ids of the whole vocabulary, contiguous.
        first: The id of column 0.

    Returns:
        [3, tokens] in fp32. The label's logit is 0 if the label is not among the columns. NaN and
        infinity are treated as by torch's amax, exp and sum.
    """
    tokens, columns = logits.shape
    vector = VECTOR_BYTES // logits.element_size()
    lanes = min(STATISTICS_LANES, triton.next_power_of_2(triton.cdiv(columns, vector)))
    statistics = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    statistics_kernel[(tokens,)](
        logits,
        labels,
        statistics,
        logits.stride(0),
        columns,
        first,
        tokens,
        LANES=lanes,
        VECTOR=vector,
        MASKED=columns % (lanes * vector) != 0,
        num_warps=min(STATISTICS_WARPS, max(1, lanes // 32)),
    )
    return statistics


def write_gradient_(
    logits: Tensor, labels: Tensor, max_logit: Tensor, factor: Tensor, at_label: Tensor, first: int
) -> None:
    """Overwrite logits by ``exp(logits - max_logit) * factor``, minus ``at_label`` at the label.

    Args:
        logits: As for ``row_statistics``.
        labels: As for ``row_statistics``.
        max_logit: [tokens] fp32; contiguous, as are the following two.
        factor: [tokens] fp32, the gradient that reaches the softmax, divided by the softmax's sum.
        at_label: [tokens] fp32, the gradient of the cross-entropy.
        first: The id of column 0.
    """
    tokens, columns = logits.shape
    block = GRADIENT_BYTES // logits.element_size()
    block = min(block, triton.next_power_of_2(columns))
    blocks = triton.cdiv(columns, block)
    gradient_kernel[(tokens * blocks,)](
        logits,
        labels,
        max_logit,
        factor,
        at_label,
        logits.stride(0),
        columns,
        first,
        blocks,
        BLOCK=block,
        MASKED=columns % block != 0,
        num_warps=GRADIENT_WARPS,
    )
