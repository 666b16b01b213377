"""QK-norm and rotary embedding of a layer's queries and keys: separately, and in our kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import (
    Context,
    Figures,
    LeftOutError,
    ToleranceError,
    median_and_spread,
    need_gpu,
    process_group,
    time_calls,
)
from megatron_chameleon.model.fused_qk_norm import RotaryTables, norm_rope
from megatron_chameleon.model.layers import QK_NORM_EPSILON
from megatron_chameleon.parallel import platform

TOLERANCE = 2e-2
"""Relative root mean square error of result and gradients, bf16 against float64. The separate
operations round to 2^-9 several times."""


@dataclass
class Inputs:
    """Queries and their parameters; the keys of the 7B have the same shape."""

    x: Tensor
    """[S, B, N, D], a part of the columns of one matrix product, as in training."""
    weight: Tensor
    bias: Tensor
    """[groups, D]"""
    angles: Tensor
    grad: Tensor

    @property
    def heads_per_group(self) -> int:
        return self.x.size(2) // len(self.weight)


Operation = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]
"""Computes the result for x, weight and bias."""


def run(context: Context) -> None:
    # enough sequences that the GPU takes longer than Python takes to launch the kernels
    shape = (16, 1, 4, 16) if context.tiny else (4096, 8, 32, 128)
    length, batch, heads, head_size = shape
    operations: dict[str, Operation] = {
        "torch": partial(separate, fused_rotation=False),
        "torch's norm, Transformer Engine's rotation": partial(separate, fused_rotation=True),
        "ours, Triton": partial(fused, RotaryTables()),
    }
    with process_group():
        for groups in (1, heads):
            for name, operation in operations.items():
                context.row(
                    f"{name}, {length:,} x {batch} x {heads} heads of {head_size}, groups {groups}",
                    partial(measure, context, operation, shape, groups),
                    "forward and backward, queries and keys",
                )


def draw(length: int, batch: int, heads: int, head_size: int, groups: int) -> Inputs:
    device = platform.device()
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(torch.bfloat16)

    turns = 10_000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
    half = torch.outer(torch.arange(length, device=device).float(), turns)
    return Inputs(
        x=random(length, batch, heads, 3 * head_size)[..., :head_size],
        weight=1 + random(groups, head_size) / 4,
        bias=random(groups, head_size) / 4,
        angles=torch.cat((half, half), dim=-1)[:, None, None],
        grad=random(length, batch, heads, head_size),
    )


def separate(
    inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor, *, fused_rotation: bool
) -> Tensor:
    """The operations of ``HeadLayerNorm`` and megatron-core."""
    if fused_rotation:
        need_gpu("Transformer Engine's rotation is a CUDA kernel")
        if not platform.has_transformer_engine():
            raise LeftOutError("Transformer Engine cannot be imported here")
    if len(weight) == 1:
        x = functional.layer_norm(x, x.shape[-1:], weight[0], bias[0], QK_NORM_EPSILON)
    else:
        x = functional.layer_norm(x, x.shape[-1:], eps=QK_NORM_EPSILON)
        weight, bias = (p.repeat_interleave(inputs.heads_per_group, dim=0) for p in (weight, bias))
        x = x * weight + bias
    config = SimpleNamespace(
        apply_rope_fusion=fused_rotation,
        rotary_interleaved=False,
        multi_latent_attention=False,
        mrope_section=None,
    )
    return apply_rotary_pos_emb(x, inputs.angles, config)


def fused(tables: RotaryTables, inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    need_gpu("our kernels are compiled by Triton")
    return norm_rope(
        x,
        weight,
        bias,
        tables.of(inputs.angles),
        first_head=0,
        heads_per_group=inputs.heads_per_group,
        epsilon=QK_NORM_EPSILON,
    )


def measure(
    context: Context, operation: Operation, shape: tuple[int, int, int, int], groups: int
) -> Figures:
    inputs = draw(*shape, groups)

    def call() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
        result = operation(inputs, *leaves)
        return result.detach(), *torch.autograd.grad(result, leaves, inputs.grad)

    figures: Figures = {"rms error": error_of(call(), inputs), "tolerance": TOLERANCE}
    times = time_calls(lambda: (call(), call()), repeats=2 if context.tiny else 20)
    seconds, spread = median_and_spread(times)
    figures |= {"ms": seconds * 1e3, "spread": spread}
    if bandwidth := context.ceiling("copy", "GB/s"):
        # queries and keys: read and written forward, read with the gradient and written backward
        floor = 2 * 5 * inputs.grad.numel() * inputs.grad.element_size() / bandwidth / 1e9
        figures |= {"floor ms": floor * 1e3, "of the floor": floor / seconds}
    if float(figures["rms error"]) > TOLERANCE:
        raise ToleranceError(figures, "the result or a gradient exceeds the tolerance")
    return figures


def error_of(found: tuple[Tensor, ...], inputs: Inputs) -> float:
    """The largest relative root mean square error of result and gradients, against float64."""
    leaves = [t.detach().double().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    exact = Inputs(*leaves, inputs.angles.double(), inputs.grad.double())
    result = separate(exact, *leaves, fused_rotation=False)
    expected = (result, *torch.autograd.grad(result, leaves, exact.grad))
    return max(
        float((ours.double() - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found, expected, strict=True)
    )
