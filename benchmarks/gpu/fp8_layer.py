"""Compare Transformer Engine's FP8 linear layer with its emulation, on one GPU.

    python -m benchmarks.gpu.fp8_layer

Both get the same weights, inputs and output gradients for a few steps of two micro-batches. The
script prints the relative differences of output, input gradient and weight gradient, and whether
scales and amax histories are equal bit for bit. The exit code is 1 if they are not, or if a product
differs by more than LIMIT. It needs a GPU of compute capability 8.9 or higher and Transformer
Engine.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.model.chameleon import transformer_config
from megatron_chameleon.model.fp8_linear import (
    EmulatedColumnParallelLinear,
    share_delayed_scaling,
    start_fp8_step,
)
from megatron_chameleon.parallel import platform

LIMIT = 1e-2
"""Relative. Outputs are rounded to bf16 (2^-9), and Transformer Engine sums the forward product
with fewer bits than fp32 has (its ``use_split_accumulator`` is off there)."""


def build_pair(fp8: Fp8Config, size: int) -> tuple[Any, Any, Any]:
    """Build Transformer Engine's layer, its recipe, and an emulated layer of the same weights."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    format_ = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[str(fp8.format)]
    if fp8.recipe == "delayed":
        recipe = recipes.DelayedScaling(
            margin=fp8.margin,
            fp8_format=format_,
            amax_history_len=fp8.amax_history_len,
            amax_compute_algo=fp8.amax_compute_algo,
        )
    else:
        recipe = recipes.Float8CurrentScaling(fp8_format=format_)
    config = Config(fp8=fp8)
    config.training.dtype = "bf16"
    emulated = EmulatedColumnParallelLinear(
        size,
        3 * size,
        config=transformer_config(config),
        init_method=lambda weight: nn.init.normal_(weight, 0, 0.02),
        bias=False,
        fp8=fp8,
    )
    real = te.Linear(size, 3 * size, bias=False, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        real.weight.copy_(emulated.weight)
    return real, recipe, emulated


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def recipes() -> Iterator[Fp8Config]:
    """The recipes that are compared."""
    for format_ in ("hybrid", "e4m3"):
        for algo, length, margin in (("max", 4, 0), ("max", 1024, 1), ("most_recent", 16, 0)):
            yield Fp8Config(
                format=format_,
                margin=margin,
                amax_history_len=length,
                amax_compute_algo=algo,
                emulate=True,
            )
        yield Fp8Config(format=format_, recipe="tensorwise", emulate=True)


def differences(
    fp8: Fp8Config, size: int, tokens: int, steps: int
) -> tuple[dict[str, float], bool]:
    """Measure the largest differences of one recipe, and whether scales and histories are equal."""
    import transformer_engine.pytorch as te

    real, recipe, emulated = build_pair(fp8, size)
    forward = share_delayed_scaling([emulated]) if fp8.recipe == "delayed" else None
    worst = {"output": 0.0, "input gradient": 0.0, "weight gradient": 0.0}
    for step in range(steps):
        start_fp8_step(emulated)
        for micro_batch in range(2):
            x = (1 + step) * torch.randn(tokens, 1, size, device="cuda", dtype=torch.bfloat16)
            grad = torch.randn(tokens, 1, 3 * size, device="cuda", dtype=torch.bfloat16) / (
                1 + step
            )
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                expected = real(inputs[0], is_first_microbatch=micro_batch == 0)
            found, _ = emulated(inputs[1])
            if forward is not None:
                forward.update()
            weights = real.weight, emulated.weight
            (grad_x, grad_w), (own_x, own_w) = (
                torch.autograd.grad(y, [i, w], grad)
                for y, i, w in zip((expected, found), inputs, weights, strict=True)
            )
            pairs = ((found, expected), (own_x, grad_x), (own_w, grad_w))
            for name, (a, b) in zip(worst, pairs, strict=True):
                worst[name] = max(worst[name], difference(a.detach(), b.detach()))
        with torch.no_grad():
            for layer in (real, emulated):
                layer.weight.mul_(0.95)
    return worst, states_are_equal(real, emulated) if forward is not None else True


def compare(fp8: Fp8Config, size: int, tokens: int, steps: int) -> bool:
    """Print the differences of one recipe, and return whether all are within the limit."""
    worst, equal = differences(fp8, size, tokens, steps)
    text = ", ".join(f"{name} {value:.2e}" for name, value in worst.items())
    delayed = fp8.recipe == "delayed"
    state = f"; scales and histories {'equal' if equal else 'DIFFER'}" if delayed else ""
    print(f"{fp8.recipe} {fp8.format} {fp8.amax_compute_algo} margin {fp8.margin}: {text}{state}")
    return equal and max(worst.values()) < LIMIT


def states_are_equal(real: Any, emulated: Any) -> bool:
    """Compare scales and histories.

    Transformer Engine has unused entries for outputs and input gradients after these.
    """
    meta, state = real.fp8_meta, emulated.get_extra_state()
    forward, backward = meta["scaling_fwd"], meta["scaling_bwd"]
    scale = torch.cat([forward.scale[:2], backward.scale[:1]]).cpu()
    history = torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], dim=1).cpu()
    if not torch.equal(scale, state["scale"]):
        print(f"  scales: Transformer Engine {scale.tolist()}, here {state['scale'].tolist()}")
    if not torch.equal(history, state["amax_history"]):
        print(
            f"  histories: Transformer Engine {history.tolist()}, "
            f"here {state['amax_history'].tolist()}"
        )
    return torch.equal(scale, state["scale"]) and torch.equal(history, state["amax_history"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="input features")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    obstacle = platform.fp8_obstacle()
    if obstacle:
        sys.exit(f"error: FP8 {obstacle}. Run this on H100/H200 with Transformer Engine.")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.cuda.set_device(0)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    fine = True
    for fp8 in recipes():
        fine &= compare(fp8, args.size, args.tokens, args.steps)
    torch.distributed.destroy_process_group()
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
