"""The loss: its accuracy against float64 (part ``parity``), its time and memory (part ``loss``)."""

from collections.abc import Callable

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import (
    Context,
    Figures,
    LeftOutError,
    ToleranceError,
    free_memory,
    median_and_spread,
    need_gpu,
    peak_gib,
    process_group,
    reset_peak,
    time_calls,
)
from megatron_chameleon.model.loss import (
    LossParts,
    fused_vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron_chameleon.parallel import platform

Z_LOSS = 1e-5
Loss = Callable[[Tensor, Tensor], Tensor]
LOSS_TOLERANCE = 1e-3
"""Relative, between losses of the same bf16 logits with and without the z-loss. The z-loss is
1e-5 x log(Z)^2, and log(Z) is about 15 at 65,536 entries."""


def run(context: Context) -> None:
    tokens, vocab = (256, 512) if context.tiny else (8192, 65_536)
    losses: dict[str, Loss] = {
        "ours, with z-loss": ours,
        "ours, Triton, with z-loss": ours_fused,
        "torch": torch_loss,
        "megatron-core": megatron,
        "megatron-core fused": megatron_fused,
        "Transformer Engine": transformer_engine,
    }
    with process_group():
        for name, loss in losses.items():
            context.row(
                f"{name}, {tokens:,} x {vocab:,}",
                lambda loss=loss: loss_figures(context, loss, tokens, vocab),
            )


def ours(logits: Tensor, labels: Tensor, parts: LossParts = vocab_parallel_cross_entropy) -> Tensor:
    """The loss as the engine computes it."""
    group = parallel_state.get_tensor_model_parallel_group()
    cross_entropy, log_z, _ = parts(logits, labels, group)
    return (cross_entropy + Z_LOSS * log_z.square()).sum()


def ours_fused(logits: Tensor, labels: Tensor) -> Tensor:
    need_gpu("our kernels are compiled by Triton")
    return ours(logits, labels, fused_vocab_parallel_cross_entropy)


def torch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def megatron(logits: Tensor, labels: Tensor) -> Tensor:
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels).sum()


def megatron_fused(logits: Tensor, labels: Tensor) -> Tensor:
    need_gpu("its kernels are compiled by Triton")
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return fused_vocab_parallel_cross_entropy(logits, labels, group).sum()


def transformer_engine(logits: Tensor, labels: Tensor) -> Tensor:
    need_gpu("Transformer Engine's kernel is written in Triton")
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    if te_parallel_cross_entropy is None:
        raise LeftOutError("this Transformer Engine has no parallel_cross_entropy")
    group = parallel_state.get_tensor_model_parallel_group()
    return te_parallel_cross_entropy(logits, labels, group).sum()


def draw(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [tokens, 1, vocabulary] and labels [tokens, 1] on the device."""
    generator = torch.Generator(platform.device()).manual_seed(1)
    device = platform.device()
    logits = torch.randn(tokens, 1, vocab, generator=generator, device=device, dtype=dtype) * 3
    return logits, torch.randint(vocab, (tokens, 1), generator=generator, device=device)


def loss_figures(context: Context, loss: Loss, tokens: int, vocab: int) -> Figures:
    """Measure forward and backward over bf16 logits. Some losses overwrite the logits, so each call
    gets a new copy."""
    source, labels = draw(tokens, vocab, torch.bfloat16)
    values = []

    def call(logits: Tensor) -> None:
        value = loss(logits, labels)
        torch.autograd.grad(value, logits)
        values.append(value.detach())

    times = time_calls(
        call, repeats=2 if context.tiny else 10, setup=lambda: source.clone().requires_grad_()
    )
    seconds, spread = median_and_spread(times)
    added = added_gib(call, source.clone().requires_grad_())
    figures: Figures = {"ms": seconds * 1e3, "spread": spread, "GiB beyond the logits": added}
    if bandwidth := context.ceiling("copy", "GB/s"):
        # bf16 logits are read forward and backward, and their gradient is written
        floor = 3 * source.numel() * source.element_size() / bandwidth / 1e9
        figures |= {"floor ms": floor * 1e3, "of the floor": floor / seconds}
    expected = float(torch_loss(source, labels))
    figures["loss per token"] = float(values[-1]) / tokens
    if abs(float(values[-1]) / expected - 1) > LOSS_TOLERANCE:
        raise ToleranceError(figures, f"the loss is {float(values[-1])}, torch's is {expected}")
    return figures


def added_gib(call: Callable[[Tensor], None], logits: Tensor) -> float:
    """Measure by how many GiB a call raises the memory in use."""
    free_memory()
    reset_peak()
    before = peak_gib() or 0.0  # the peak was just reset, so this is the memory in use
    call(logits)
    return (peak_gib() or 0.0) - before


def parity_figures(
    loss: Loss, tokens: int, vocab: int, dtype: torch.dtype, tolerance: float
) -> Figures:
    """Compare one of our losses and its gradient with float64 on the CPU."""
    logits, labels = draw(tokens, vocab, dtype)
    exact = logits.cpu().double().flatten(0, 1).requires_grad_()
    log_z = exact.logsumexp(-1)
    picked = exact.gather(-1, labels.cpu()).squeeze(-1)
    expected = (log_z - picked + Z_LOSS * log_z.square()).sum()
    (expected_grad,) = torch.autograd.grad(expected, exact)
    logits.requires_grad_()
    value = loss(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    difference = grad.cpu().double().flatten(0, 1) - expected_grad
    figures: Figures = {
        "loss error": abs(float(value) / float(expected) - 1),
        "gradient max error": float(difference.abs().max() / expected_grad.abs().max()),
        "gradient rms error": float(difference.norm() / expected_grad.norm()),
        "tolerance": tolerance,
    }
    if max(float(figures["loss error"]), float(figures["gradient rms error"])) > tolerance:
        raise ToleranceError(figures, "the loss or its gradient exceeds the tolerance")
    return figures
