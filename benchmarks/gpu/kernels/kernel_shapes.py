"""Time the Triton kernels at other tile sizes and numbers of warps, to choose their constants."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.common import median_and_spread, time_calls
from megatron_chameleon.model.kernels import cross_entropy, norm_rope

CHOICES: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "loss forward": (
        cross_entropy,
        {"STATISTICS_LANES": (512, 1024, 2048), "STATISTICS_WARPS": (4, 8, 16)},
    ),
    "loss backward": (
        cross_entropy,
        {"GRADIENT_BYTES": (4096, 8192, 16384, 32768), "GRADIENT_WARPS": (4, 8)},
    ),
    "QK-norm and rotary forward": (
        norm_rope,
        {"FORWARD_ROWS": (16, 32, 64), "MOST_HEADS": (4, 8, 16), "WARPS": (4, 8)},
    ),
    "QK-norm and rotary backward": (
        norm_rope,
        {
            "BACKWARD_ROWS": (8, 16, 32),
            "MOST_HEADS": (4, 8),
            "BACKWARD_TILES": (8, 16, 32),
            "WARPS": (4, 8),
        },
    ),
}
"""kernel -> module, and the values to try for its constants."""


def sweep(device: torch.device, *, tiny: bool) -> Iterator[str]:
    """Yield one line for each choice of constants; the current choice is marked."""
    for name, (call, moved_bytes) in calls(device, tiny).items():
        module, choices = CHOICES[name]
        current = {constant: getattr(module, constant) for constant in choices}
        for values in list(product(*choices.values()))[: 1 if tiny else None]:
            chosen = dict(zip(choices, values, strict=True))
            with mock.patch.multiple(module, **chosen):
                times = time_calls(call, repeats=1 if tiny else 20, warmup=1 if tiny else 3)
            seconds, _ = median_and_spread(times)
            rate = moved_bytes / seconds / 1e9
            mark = " (current)" if chosen == current else ""
            what = ", ".join(f"{constant} {value}" for constant, value in chosen.items())
            yield f"{name}: {what}: {seconds * 1e3:.3f} ms, {rate:,.0f} GB/s{mark}"


def calls(device: torch.device, tiny: bool) -> dict[str, tuple[Callable[[], object], int]]:
    """The timed functions, each with the number of bytes that it must move."""
    tokens, vocab, length, batch, heads = (4, 64, 4, 1, 2) if tiny else (8192, 65_536, 4096, 8, 32)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    logits = random(tokens, vocab)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    # with factor 0 the gradient is 0, and a second call works on it like the first
    row = torch.zeros(tokens, device=device)
    x, grad = random(length, batch, heads, 3 * 128)[..., :128], random(length, batch, heads, 128)
    weight, angles = random(1, 128), random(length, 64, dtype=torch.float32)
    tables = angles.cos(), angles.sin()
    heads_and_epsilon = (0, heads, 1e-5)
    logit_bytes, head_bytes = 2 * logits.numel(), 2 * grad.numel()
    return {
        "loss forward": (lambda: cross_entropy.row_statistics(logits, labels, 0), logit_bytes),
        "loss backward": (
            lambda: cross_entropy.write_gradient_(logits, labels, row, row, row, 0),
            2 * logit_bytes,
        ),
        "QK-norm and rotary forward": (
            lambda: norm_rope.forward(x, weight, weight, *tables, *heads_and_epsilon),
            2 * head_bytes,
        ),
        "QK-norm and rotary backward": (
            lambda: norm_rope.backward(x, grad, weight, *tables, *heads_and_epsilon),
            3 * head_bytes,
        ),
    }
