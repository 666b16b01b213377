"""QK-norm and rotary embedding in one kernel, compared with what it replaces in float64."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.model.fused_qk_norm import RotaryTables, norm_rope
from megatron_chameleon.parallel import platform

pytest.importorskip("triton")
EPSILON = 1e-5

# fp32: about ten roundings of 6e-8 and, in the weights' gradients, sums over the positions. bf16:
# the result is rounded once, towards 0 in the interpreter.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(platform.device(), dtype)


def angles(length: int, head_size: int) -> Tensor:
    """[S, 1, 1, D], like the result of megatron-core's RotaryEmbedding."""
    turns = 10_000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    half = torch.outer(torch.arange(length).float(), turns)
    return torch.cat((half, half), dim=-1)[:, None, None].to(platform.device())


def expected_values(
    x: Tensor, weight: Tensor, bias: Tensor, heads: slice, heads_per_group: int, grad: Tensor
) -> list[Tensor]:
    """Result and gradients in float64, by torch and by megatron-core's rotation."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    of_heads = [p.repeat_interleave(heads_per_group, dim=0)[heads] for p in (weight, bias)]
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPSILON) * of_heads[0] + of_heads[1]
    out = _apply_rotary_pos_emb_bshd(normed, angles(*x.shape[::3]).double())
    return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad.double())]


def found_values(
    x: Tensor, weight: Tensor, bias: Tensor, heads: slice, heads_per_group: int, grad: Tensor
) -> list[Tensor]:
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    out = norm_rope(
        x,
        weight,
        bias,
        RotaryTables().of(angles(*x.shape[::3])),
        first_head=heads.start,
        heads_per_group=heads_per_group,
        epsilon=EPSILON,
    )
    assert out.is_contiguous() and out.dtype == x.dtype
    return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad)]


def assert_same(x: Tensor, groups: int, heads_per_group: int, first: int, grad: Tensor) -> None:
    dtype, own = x.dtype, slice(first, first + x.size(2))
    weight = 1 + 0.3 * draw(groups, x.size(-1), seed=2, dtype=dtype)
    bias = 0.3 * draw(groups, x.size(-1), seed=3, dtype=dtype)
    arguments = (x, weight, bias, own, heads_per_group, grad)
    found, expected = found_values(*arguments), expected_values(*arguments)
    for name, ours, exact in zip(("result", "x", "weight", "bias"), found, expected, strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize(
    ("heads", "groups", "first", "heads_per_group"),
    [
        (4, 1, 0, 4),  # the 7B
        (4, 2, 0, 2),
        (4, 4, 0, 1),
        (2, 4, 4, 2),  # the second of four ranks' heads, inside one group
        (4, 2, 3, 4),  # heads that straddle two groups
        (3, 3, 0, 1),  # not a power of two
        (1, 2, 1, 1),  # one key head per rank
    ],
)
def test_result_and_gradients(heads: int, groups: int, first: int, heads_per_group: int) -> None:
    x, grad = draw(5, 2, heads, 16, seed=0), draw(5, 2, heads, 16, seed=1)
    assert_same(x, groups, heads_per_group, first, grad)


@pytest.mark.parametrize("head_size", [12, 8])
def test_head_sizes(head_size: int) -> None:
    x, grad = draw(4, 1, 2, head_size, seed=0), draw(4, 1, 2, head_size, seed=1)
    assert_same(x + 5, 2, 1, 0, grad)  # with a mean that is not a power of two


def test_bf16() -> None:
    x, grad = (draw(5, 1, 2, 16, seed=n, dtype=torch.bfloat16) for n in range(2))
    assert_same(x, 2, 1, 0, grad)


def test_several_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at real sizes: sums over tiles, then over programs, and a last tile that is not full."""
    from megatron_chameleon.model.kernels import norm_rope as kernels

    monkeypatch.setattr(kernels, "MOST_HEADS", 2)
    monkeypatch.setattr(kernels, "FORWARD_ROWS", 4)
    monkeypatch.setattr(kernels, "BACKWARD_ROWS", 4)
    monkeypatch.setattr(kernels, "BACKWARD_TILES", 2)
    x, grad = draw(11, 1, 5, 8, seed=0), draw(11, 1, 5, 8, seed=1)
    assert_same(x, 5, 1, 0, grad)


def test_any_strides() -> None:
    """Queries are some of the columns of one product, and gradients may come with batch first."""
    mixed, grad = draw(5, 2, 4, 3 * 8, seed=0), draw(2, 4, 5, 8, seed=1).permute(2, 0, 1, 3)
    assert_same(mixed[..., 8:16], 4, 1, 0, grad)
    x, grad = draw(5, 2, 8, 4, seed=0).transpose(2, 3), draw(1, 1, 1, 1, seed=1)
    assert_same(x, 1, 4, 0, grad.expand(x.shape))


def test_tables_are_computed_once() -> None:
    tables, given = RotaryTables(), angles(6, 8)
    first = tables.of(given)
    assert tables.of(given) is first
    assert tables.of(given.detach()) is first  # what a recomputed layer gets
    other = tables.of(angles(4, 8))
    assert other is not first
    assert torch.equal(other[1], first[1][:4])


def test_tables_of_positions_that_begin_again() -> None:
    tables, given = RotaryTables(), angles(6, 8)
    positions = torch.tensor([0, 1, 2, 0, 5, 0, 1], device=given.device)
    whole = tables.of(given)
    found = tables.of(given, positions)
    assert all(torch.equal(own, table[positions]) for own, table in zip(found, whole, strict=True))
    assert tables.of(given, positions) is found
    assert tables.of(given.detach(), positions.view(1, 7).flatten()) is found
    assert tables.of(given) is not found
    assert not torch.equal(tables.of(given, positions.flip(0))[0], found[0])
