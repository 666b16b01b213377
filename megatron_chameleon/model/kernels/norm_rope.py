"""LayerNorm over the head dimension and rotary embedding, each element read and written once.

A row is one head of one position, with D = 2 x HALF elements; the rotation pairs each element of
the first half with one of the second. A program computes a tile of POSITIONS x HEADS rows.
Everything is computed in fp32 and rounded once. Backward reads the input and normalises it again,
so that nothing else has to be kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_ROWS, BACKWARD_ROWS, WARPS = 32, 16, 4
"""Rows per tile. For bf16 heads of 128 that is 8 KiB forward, and 4 + 4 KiB backward, where the
registers also hold the sums."""
MOST_HEADS, MOST_POSITIONS = 8, 16
BACKWARD_TILES = 16
"""Tiles that a backward program computes in turn; it writes one row of sums per head."""


@triton.jit
def _row_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The sum over both halves of each row, as [POSITIONS, HEADS, 1]."""
    return tl.sum(a + b, axis=2)[:, :, None]


@triton.jit
def _normalise(
    x1: tl.tensor, x2: tl.tensor, inside: tl.tensor, epsilon: tl.tensor, HALF: tl.constexpr
) -> tuple:
    mean = _row_sum(x1, x2) / (2 * HALF)
    x1, x2 = tl.where(inside, x1 - mean, 0.0), tl.where(inside, x2 - mean, 0.0)
    scale = 1.0 / tl.sqrt(_row_sum(x1 * x1, x2 * x2) / (2 * HALF) + epsilon)
    return x1 * scale, x2 * scale, scale


@triton.jit
def _norm_gradient(
    y1: tl.tensor, y2: tl.tensor, x1: tl.tensor, x2: tl.tensor, scale: tl.tensor, HALF: tl.constexpr
) -> tuple:
    """The gradient of the norm's input, given y, that of its result x."""
    mean = _row_sum(y1, y2) / (2 * HALF)
    slope = _row_sum(y1 * x1, y2 * x2) / (2 * HALF)
    return (y1 - mean - x1 * slope) * scale, (y2 - mean - x2 * slope) * scale


@triton.jit
def _offsets(
    s: tl.tensor,
    b: tl.tensor,
    head: tl.tensor,
    column: tl.tensor,
    stride_s: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
) -> tl.tensor:
    """Offsets of the first halves of a tile's rows, [POSITIONS, HEADS, COLUMNS]."""
    start = (s * stride_s + b * stride_b)[:, None, None]
    return start + (head * stride_n)[None, :, None] + column[None, None, :]


@triton.jit
def _load_halves(pointers: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> tuple:
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(
    pointers: tl.tensor, first: tl.tensor, second: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> None:
    kind = pointers.dtype.element_ty
    tl.store(pointers, first.to(kind), mask=mask)
    tl.store(pointers + HALF, second.to(kind), mask=mask)


@triton.jit
def _load_of_groups(
    parameter_ptr: tl.tensor,
    group: tl.tensor,
    is_head: tl.tensor,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple:
    """Both halves of the weight or bias of each head's group, [HEADS, COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    at = (group * 2 * HALF)[:, None] + column[None, :]
    known = is_head[:, None] & (column < HALF)[None, :]
    return _load_halves(parameter_ptr + at, known, HALF)


@triton.jit
def _load_angles(
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s: tl.tensor,
    is_position: tl.tensor,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple:
    """Cosines and sines of each position, [POSITIONS, 1, COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    angle = (s * HALF)[:, None] + column[None, :]
    rotated = is_position[:, None] & (column < HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=rotated, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)[:, None, :]
    return cos, sin


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride_s: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    positions: tl.tensor,
    batch: tl.tensor,
    heads: tl.tensor,
    first_head: tl.tensor,
    heads_per_group: tl.tensor,
    epsilon: tl.tensor,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    inside = (column < HALF)[None, None, :]
    own = (position < positions)[:, None, None] & (head < heads)[None, :, None] & inside
    s, b = (position // batch).to(tl.int64), (position % batch).to(tl.int64)
    at = _offsets(s, b, head, column, stride_s, stride_b, stride_n)
    x1, x2 = _load_halves(x_ptr + at, own, HALF)
    x1, x2, _ = _normalise(x1, x2, inside, epsilon, HALF)

    group = (first_head + head) // heads_per_group
    weight1, weight2 = _load_of_groups(weight_ptr, group, head < heads, HALF, COLUMNS)
    bias1, bias2 = _load_of_groups(bias_ptr, group, head < heads, HALF, COLUMNS)
    y1, y2 = x1 * weight1[None] + bias1[None], x2 * weight2[None] + bias2[None]

    cos, sin = _load_angles(cos_ptr, sin_ptr, s, position < positions, HALF, COLUMNS)
    row = (position.to(tl.int64) * heads)[:, None, None] + head[None, :, None]
    out = out_ptr + row * (2 * HALF) + column[None, None, :]
    _store_halves(out, y1 * cos - y2 * sin, y2 * cos + y1 * sin, own, HALF)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    stride_s: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    grad_stride_s: tl.tensor,
    grad_stride_b: tl.tensor,
    grad_stride_n: tl.tensor,
    positions: tl.tensor,
    batch: tl.tensor,
    heads: tl.tensor,
    first_head: tl.tensor,
    heads_per_group: tl.tensor,
    epsilon: tl.tensor,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """The gradient of x, and sums over positions of those of weight and bias, [2, heads, D]."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    inside = (column < HALF)[None, None, :]
    group = (first_head + head) // heads_per_group
    weight1, weight2 = _load_of_groups(weight_ptr, group, head < heads, HALF, COLUMNS)
    zeros = tl.full([POSITIONS, HEADS, COLUMNS], 0.0, tl.float32)
    weight_sum1, weight_sum2, bias_sum1, bias_sum2 = zeros, zeros, zeros, zeros
    for tile in range(TILES):
        position = (tl.program_id(0) * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
        own = (position < positions)[:, None, None] & (head < heads)[None, :, None] & inside
        s, b = (position // batch).to(tl.int64), (position % batch).to(tl.int64)
        at = _offsets(s, b, head, column, stride_s, stride_b, stride_n)
        x1, x2 = _load_halves(x_ptr + at, own, HALF)
        at = _offsets(s, b, head, column, grad_stride_s, grad_stride_b, grad_stride_n)
        out1, out2 = _load_halves(grad_ptr + at, own, HALF)
        cos, sin = _load_angles(cos_ptr, sin_ptr, s, position < positions, HALF, COLUMNS)
        y1, y2 = out1 * cos + out2 * sin, out2 * cos - out1 * sin  # gradients: the inverse rotation
        x1, x2, scale = _normalise(x1, x2, inside, epsilon, HALF)
        weight_sum1 += y1 * x1
        weight_sum2 += y2 * x2
        bias_sum1 += y1
        bias_sum2 += y2
        y1, y2 = _norm_gradient(y1 * weight1[None], y2 * weight2[None], x1, x2, scale, HALF)
        row = (position.to(tl.int64) * heads)[:, None, None] + head[None, :, None]
        grad_x = grad_x_ptr + row * (2 * HALF) + column[None, None, :]
        _store_halves(grad_x, y1, y2, own, HALF)

    row = tl.program_id(0) * 2 * heads + head
    sums = sums_ptr + (row * (2 * HALF))[:, None] + column[None, :]
    known = (head < heads)[:, None] & (column < HALF)[None, :]
    _store_halves(sums, tl.sum(weight_sum1, axis=0), tl.sum(weight_sum2, axis=0), known, HALF)
    sums += heads * (2 * HALF)
    _store_halves(sums, tl.sum(bias_sum1, axis=0), tl.sum(bias_sum2, axis=0), known, HALF)


def tile_shape(heads: int, head_size: int, rows: int) -> tuple[int, int, int, int]:
    """HALF, COLUMNS, POSITIONS and HEADS of a tile with ``rows`` rows; fewer if heads are few."""
    half = head_size // 2
    tile_heads = min(MOST_HEADS, triton.next_power_of_2(heads))
    tile_positions = min(MOST_POSITIONS, rows // tile_heads)
    return half, triton.next_power_of_2(half), tile_positions, tile_heads


def forward(
    x_SBND: Tensor,
    weight_GD: Tensor,
    bias_GD: Tensor,
    cos_SC: Tensor,
    sin_SC: Tensor,
    first_head: int,
    heads_per_group: int,
    epsilon: float,
) -> Tensor:
    """Normalise each head, apply its group's weight and bias, and rotate it.

    Args:
        x_SBND: Any strides, except for 1 in the last dimension.
        weight_GD: The weights of all groups, contiguous like the following tensors.
        bias_GD: The biases of all groups.
        cos_SC: Cosines of each position's angles, C = D / 2, fp32.
        sin_SC: Sines of each position's angles.
        first_head: The number of x's first head among the heads of all ranks.
        heads_per_group: Group g has the heads from g x ``heads_per_group`` on.
        epsilon: Added to the variance.

    Returns:
        [S, B, N, D], contiguous, in x's dtype.
    """
    length, batch, heads, head_size = x_SBND.shape
    half, columns, tile_positions, tile_heads = tile_shape(heads, head_size, FORWARD_ROWS)
    out_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype, device=x_SBND.device)
    grid = (triton.cdiv(length * batch, tile_positions), triton.cdiv(heads, tile_heads))
    forward_kernel[grid](
        x_SBND,
        weight_GD,
        bias_GD,
        cos_SC,
        sin_SC,
        out_SBND,
        *x_SBND.stride()[:3],
        length * batch,
        batch,
        heads,
        first_head,
        heads_per_group,
        epsilon,
        HALF=half,
        COLUMNS=columns,
        POSITIONS=tile_positions,
        HEADS=tile_heads,
        num_warps=WARPS,
    )
    return out_SBND


def backward(
    x_SBND: Tensor,
    grad_SBND: Tensor,
    weight_GD: Tensor,
    cos_SC: Tensor,
    sin_SC: Tensor,
    first_head: int,
    heads_per_group: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``forward``.

    Args:
        x_SBND: As for ``forward``.
        grad_SBND: The gradient of the result. Any strides, except for 1 in the last dimension.
        weight_GD: As for ``forward``, like cos_SC, sin_SC, first_head, heads_per_group and epsilon.

    Returns:
        The gradient of x, contiguous; and, for each of x's heads, the gradients of its weight and
        bias in fp32, [2, N, D]. Sums have a fixed order, so the same input gives the same bits.
    """
    length, batch, heads, head_size = x_SBND.shape
    half, columns, tile_positions, tile_heads = tile_shape(heads, head_size, BACKWARD_ROWS)
    programs = triton.cdiv(length * batch, tile_positions * BACKWARD_TILES)
    grad_x_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype, device=x_SBND.device)
    sums = torch.empty(programs, 2, heads, head_size, dtype=torch.float32, device=x_SBND.device)
    backward_kernel[(programs, triton.cdiv(heads, tile_heads))](
        x_SBND,
        grad_SBND,
        weight_GD,
        cos_SC,
        sin_SC,
        grad_x_SBND,
        sums,
        *x_SBND.stride()[:3],
        *grad_SBND.stride()[:3],
        length * batch,
        batch,
        heads,
        first_head,
        heads_per_group,
        epsilon,
        HALF=half,
        COLUMNS=columns,
        POSITIONS=tile_positions,
        HEADS=tile_heads,
        TILES=BACKWARD_TILES,
        num_warps=WARPS,
    )
    return grad_x_SBND, sums.sum(dim=0)
