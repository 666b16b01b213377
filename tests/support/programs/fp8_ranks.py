"""Compare emulated FP8 layers on two ranks with the same layers on one (``test_fp8_layouts.py``).

Usage: torchrun --nproc-per-node 2 tests/support/programs/fp8_ranks.py
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.model.chameleon import transformer_config
from megatron_chameleon.model.fp8_linear import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
    share_delayed_scaling,
    start_fp8_step,
)
from megatron_chameleon.parallel.megatron_setup import prepare_megatron

INPUT, OUTPUT, SEQUENCE, BATCH = 64, 96, 16, 2
OPTIONS: dict[str, Any] = {"bias": False, "skip_bias_add": False, "init_method": lambda w: w}
# the same FP8 values, summed in a different order in fp32
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(2, dim)[dist.get_rank()].contiguous()


def summed(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def build(kind: type, fp8: Fp8Config, weight: Tensor, group: Any, sequence_parallel: bool) -> Any:
    """The layer on ``group``; ``weight`` is this rank's part."""
    config = Config()
    config.parallel.tensor_model_parallel_size = group.size()
    config.parallel.sequence_parallel = sequence_parallel
    rows, columns = weight.shape
    if kind is EmulatedColumnParallelLinear:
        sizes, options = (columns, rows * group.size()), OPTIONS
    else:
        sizes, options = (columns * group.size(), rows), {**OPTIONS, "input_is_parallel": True}
    layer = kind(*sizes, config=transformer_config(config), fp8=fp8, tp_group=group, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def run(layer: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    start_fp8_step(layer)
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight], grad)


def delayed_equals_one_process(kind: type, sequence_parallel: bool, alone: Any, both: Any) -> None:
    """Compare everything: products, scales and histories, over three steps."""
    fp8 = Fp8Config(format="hybrid", amax_history_len=4, emulate=True)
    weight = 0.1 * draw(0, OUTPUT, INPUT)
    column = kind is EmulatedColumnParallelLinear
    whole = build(kind, fp8, weight, alone, False)
    split = build(kind, fp8, part(weight, 0 if column else 1), both, sequence_parallel)
    updates = share_delayed_scaling([whole]), share_delayed_scaling([split], both)
    for i in range(3):
        x, grad = draw(1 + i, SEQUENCE, BATCH, INPUT), draw(9 + i, SEQUENCE, BATCH, OUTPUT)
        y, grad_x, grad_weight = run(whole, x, grad)
        # One side is split over the features, and the other over the sequence or not at all.
        if sequence_parallel:
            own = (part(x, 0), part(grad, 2)) if column else (part(x, 2), part(grad, 0))
            expected = (part(y, 2), part(grad_x, 0)) if column else (part(y, 0), part(grad_x, 2))
        else:
            own = (x, part(grad, 2)) if column else (part(x, 2), grad)
            expected = (part(y, 2), grad_x) if column else (y, part(grad_x, 2))
        found = run(split, *own)
        expected = (*expected, part(grad_weight, 0 if column else 1))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
        for scaling in updates:
            scaling.update()
    for key in ("scale", "amax_history"):
        assert torch.equal(split.get_extra_state()[key], whole.get_extra_state()[key]), key
    assert (split.get_extra_state()["scale"] != 1).all()


def current_scaling_takes_each_ranks_part(
    kind: type, sequence_parallel: bool, alone: Any, both: Any
) -> None:
    """A tensor that is split over the features has a scale per rank; others have one for all."""
    fp8 = Fp8Config(format="hybrid", recipe="tensorwise", emulate=True)
    column = kind is EmulatedColumnParallelLinear
    weight = part(0.1 * draw(0, OUTPUT, INPUT), 0 if column else 1)
    x, grad = draw(1, SEQUENCE, BATCH, INPUT), draw(9, SEQUENCE, BATCH, OUTPUT)
    x[0, 0, 0] = 30  # the largest value is on rank 0 only, however the tensor is split
    grad[0, 0, 0] = 30
    own_x, own_grad = (x, part(grad, 2)) if column else (part(x, 2), grad)
    y, grad_x, grad_weight = run(build(kind, fp8, weight, alone, False), own_x, own_grad)
    y, grad_x = (y, summed(grad_x)) if column else (summed(y), grad_x)
    if sequence_parallel:
        own_x, grad_x = (part(own_x, 0), part(grad_x, 0)) if column else (own_x, grad_x)
        own_grad, y = (own_grad, y) if column else (part(own_grad, 0), part(y, 0))
    found = run(build(kind, fp8, weight, both, sequence_parallel), own_x, own_grad)
    for a, b in zip(found, (y, grad_x, grad_weight), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def data_parallel_ranks_share_their_largest() -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    fp8 = Fp8Config(format="hybrid", amax_history_len=2, emulate=True)
    own = parallel_state.get_tensor_model_parallel_group()
    layer = build(EmulatedColumnParallelLinear, fp8, draw(0, OUTPUT, INPUT), own, False)
    forward = share_delayed_scaling([layer], group)
    x = (1 + dist.get_rank()) * draw(1, SEQUENCE, BATCH, INPUT)
    run(layer, x, x.new_ones(SEQUENCE, BATCH, OUTPUT) / (1 + dist.get_rank()))
    forward.update()
    newest = layer.get_extra_state()["amax_history"][-1]
    largest = draw(1, SEQUENCE, BATCH, INPUT).abs().amax()
    assert newest.tolist() == [2 * largest, draw(0, OUTPUT, INPUT).abs().amax(), 1.0]


def main() -> None:
    prepare_megatron()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    megatron_random.model_parallel_cuda_manual_seed(1)
    both = parallel_state.get_tensor_model_parallel_group()
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for kind in (EmulatedColumnParallelLinear, EmulatedRowParallelLinear):
        for sequence_parallel in (False, True):
            delayed_equals_one_process(kind, sequence_parallel, alone, both)
            current_scaling_takes_each_ranks_part(kind, sequence_parallel, alone, both)
            if dist.get_rank() == 0:
                print(kind.__name__, f"sequence_parallel={sequence_parallel}: equal", flush=True)
    data_parallel_ranks_share_their_largest()
    if dist.get_rank() == 0:
        print("data parallel: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
