"""Measure the limits of this machine: the speed of its matrix products and of its memory."""

from collections.abc import Callable

import torch

from benchmarks.gpu.common import Context, Figures, median_and_spread, need_fp8, time_calls
from megatron_chameleon.parallel import platform


def run(context: Context) -> None:
    size = 256 if context.tiny else 8192
    note = f"{size} x {size} x {size}, random numbers"
    context.row("bf16 matmul", lambda: product(size, bf16_product(size)), note)
    context.row("fp8 matmul", lambda: product(size, fp8_product(size)), note)
    count = 2**22 if context.tiny else 2**32
    context.row("copy", lambda: copy(count), f"{count / 2**20:,.0f} MiB, read and written")


def bf16_product(size: int) -> Callable[[], torch.Tensor]:
    a, b = (
        torch.randn(size, size, device=platform.device(), dtype=torch.bfloat16) for _ in range(2)
    )
    return lambda: a @ b


def fp8_product(size: int) -> Callable[[], torch.Tensor]:
    """E4M3 with one scale per tensor, summed like Transformer Engine's forward products."""
    need_fp8()
    device = platform.device()
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def product(size: int, multiply: Callable[[], torch.Tensor]) -> Figures:
    seconds, spread = median_and_spread(time_calls(multiply, repeats=20, warmup=5))
    return {"TFLOP/s": 2 * size**3 / seconds / 1e12, "spread": spread}


def copy(count: int) -> Figures:
    """Measure a copy, which reads and writes every byte."""
    source = torch.ones(count, dtype=torch.uint8, device=platform.device())
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), repeats=20, warmup=5)
    seconds, spread = median_and_spread(times)
    return {"GB/s": 2 * count / seconds / 1e9, "spread": spread}
