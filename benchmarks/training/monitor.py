"""The cost of the monitor: its share of the CPU time of a training step.

    python -W ignore -m benchmarks.training.monitor

The time inside each of the monitor's functions is added up over the steps. This can detect a
hundredth of a step on a machine whose steps vary by more. Steps without the monitor's hooks
alternate with these, as a check. They also measure the norm of all gradients with megatron-core's
function, and the time that the norms by group take beyond it is the monitor's cost. The script uses
one thread and random tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from benchmarks.training.train_step import Size, draw_batches, make_config
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import ModelConfig, ParallelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import Topology, create_topology
from megatron_chameleon.training.engines.gradient_groups import GradientGroups
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.metrics.layers import LayerMonitor
from megatron_chameleon.training.metrics.step_metrics import StepMonitor

SIZES = {
    "10.5M": Size(ModelConfig(8, 256, 688, 4, seq_length=256), 8192, 4),
    "33.7M": Size(ModelConfig(8, 512, 1376, 8, seq_length=256), 8192, 4),
}
QUICK = {"quick": Size(ModelConfig(2, 32, 64, 2, seq_length=32), 128, 2)}
GROUPS, WHOLE = "gradients by group", "gradients as a whole"
FUNCTIONS: dict[tuple[type, str], str] = {
    (LayerMonitor, "_observe_output"): "layers' output norms",
    (LayerMonitor, "_observe_attention"): "attention logits",
    (GradientGroups, "squares"): GROUPS,
    (StepMonitor, "observe_loss"): "losses, log(Z)",
    (StepMonitor, "finish_step"): "reduction",
}


class Clock:
    """Adds up the CPU time of the monitor's functions from its creation on."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*FUNCTIONS.values(), WHOLE], 0.0)
        for (cls, name), words in FUNCTIONS.items():
            setattr(cls, name, self.timed(getattr(cls, name), words))

    def timed(self, function: Callable[..., Any], words: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[words] += time.process_time() - start

        return timed


def without_hooks(engine: MegatronEngine, clock: Clock) -> MegatronEngine:
    """Reduce an engine's measurements to the losses and the norm of all gradients."""
    for part in engine.parts:
        for module in part.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                    del hooks[key]
    whole = clock.timed(engine.optimizer.get_grad_norm, WHOLE)
    engine.gradients.squares = lambda: torch.tensor(whole())  # type: ignore[method-assign]
    engine.gradients.norms = lambda norm: (float(norm), {})  # type: ignore[method-assign]
    return engine


def _is_ours(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    return isinstance(getattr(function, "__self__", None), LayerMonitor)


def run(engine: MegatronEngine, batches: Sequence[Batch], first: int, steps: int) -> float:
    """Run a number of steps and return their CPU seconds."""
    start = time.process_time()
    for step in range(first, first + steps):
        engine.train_step(step + 1, [batches[step % len(batches)]])
    return time.process_time() - start


def measure(name: str, size: Size, topology: Topology, clock: Clock, blocks: int) -> None:
    batches, config = draw_batches(size, 8), make_config(size, "fp32")
    watched = MegatronEngine(config, size.vocab_size, topology)
    plain = without_hooks(MegatronEngine(config, size.vocab_size, topology), clock)
    steps = 3
    for engine in (watched, plain):
        run(engine, batches, 0, steps)
    found: dict[str, list[float]] = {"with": [], "without": []}
    inside = dict.fromkeys(clock.seconds, 0.0)
    for block in range(1, blocks + 1):
        for kind, engine in (("with", watched), ("without", plain)):
            before = dict(clock.seconds)
            found[kind].append(run(engine, batches, block * steps, steps))
            for words in [WHOLE] if kind == "without" else FUNCTIONS.values():
                inside[words] += clock.seconds[words] - before[words]
    total = sum(found["with"])
    count = count_parameters(size.model, size.vocab_size)
    print(f"{name}: {count:,} parameters, {total / blocks / steps:.3f} CPU seconds per step")
    whole = inside.pop(WHOLE)
    print(
        f"  {GROUPS} and in total {inside[GROUPS] / total:.3%}, in total only {whole / total:.3%}"
    )
    inside[GROUPS] -= whole
    for words, seconds in inside.items():
        print(f"  {words:24} {seconds / total:7.3%}")
    print(f"  {'together':24} {sum(inside.values()) / total:7.3%}")
    ratio = statistics.median(found["with"]) / statistics.median(found["without"])
    print(f"  steps with hooks over steps without: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use a tiny model")
    parser.add_argument("--blocks", type=int, default=7)
    args = parser.parse_args()
    sizes, blocks = (QUICK, 1) if args.quick else (SIZES, args.blocks)
    torch.set_num_threads(1)
    clock = Clock()  # before any hook refers to one of the functions
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    try:
        topology = create_topology(ParallelConfig())
        for name, size in sizes.items():
            measure(name, size, topology, clock, blocks)
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
