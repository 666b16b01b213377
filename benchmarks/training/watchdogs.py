"""The cost of the watchdogs of a run: their share of the CPU time of a training step.

    python -W ignore -m benchmarks.training.watchdogs

Each watchdog is called many times on its own, as often as the loop calls it, on one process. The
comparison of ranks includes its collective and is divided by the ten steps that it serves. The
check for values that are not finite is also timed against an update without it: the parts of
megatron-core's step against ``optimizer.step()``. The script uses one thread and random tokens.
"""

import argparse
import faulthandler
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.training.monitor import QUICK, SIZES, run
from benchmarks.training.train_step import Size, draw_batches, make_config
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config, ParallelConfig
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import Topology, create_topology
from megatron_chameleon.training.engines.megatron import MegatronEngine
from megatron_chameleon.training.faults.hang import HangWatch
from megatron_chameleon.training.faults.nonfinite import NonFiniteGuard
from megatron_chameleon.training.metrics.stragglers import StepClock, gather_rank_times
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.skipped_steps import SkippedSteps

CALLS = 2000
WINDOW_STEPS = 10


def cpu_seconds(action: Callable[[], object], calls: int) -> float:
    """Seconds of one call."""
    start = time.process_time()
    for _ in range(calls):
        action()
    return (time.process_time() - start) / calls


def watchdog_seconds(
    config: Config, topology: Topology, engine: MegatronEngine, calls: int
) -> dict[str, float]:
    """CPU seconds per step of each watchdog on a healthy run."""
    clock = StepClock()

    def time_step() -> None:
        clock.start()
        clock.stop()
        clock.take()

    inputs = RunInputs(config, None, None, None, SkippedSteps(), "never")  # type: ignore[arg-type]
    guard = NonFiniteGuard(
        inputs, engine, topology, finish_saves=lambda: None, say=print, warn=print, record=print
    )
    metrics = {"loss": 1.0, "grad_norm": 1.0}
    logs = Path(config.logging.run_dir) / "logs"
    with HangWatch(config.training.hang_seconds, logs, 0, 1) as watch:
        timer = cpu_seconds(lambda: faulthandler.dump_traceback_later(1000, exit=True), calls)
        endless = iter(lambda: 0, 1)
        steps = watch.steps(endless, 0)
        found = {
            "hang watch": cpu_seconds(lambda: next(steps), calls),
            "step clock": cpu_seconds(time_step, calls),
            "values": cpu_seconds(lambda: guard.check(1, metrics, [], before_save=False), calls),
        }
    print(
        f"  the hang watch's thread restarts its timer every two seconds, in {timer * 1e6:.0f} us"
    )
    compared = cpu_seconds(lambda: gather_rank_times([1.0, 0.0], topology), calls)
    return {**found, "ranks compared": compared / WINDOW_STEPS}


def update_ratio(engine: MegatronEngine, rounds: int) -> float:
    """CPU time of our update over that of megatron-core's own, alternating."""

    def ours() -> None:
        _, squares = engine._measure_gradients()
        norm, _ = engine.gradients.norms(squares)
        engine._update(norm)

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, update in (("ours", ours), ("theirs", engine.optimizer.step)):
            seconds[name].append(cpu_seconds(update, 3))
    return statistics.median(seconds["ours"]) / statistics.median(seconds["theirs"])


def measure(name: str, size: Size, topology: Topology, folder: Path, calls: int) -> None:
    config = make_config(size, "fp32")
    config.logging.run_dir = str(folder)
    engine = MegatronEngine(config, size.vocab_size, topology)
    batches = draw_batches(size, 8)
    run(engine, batches, 0, 3)
    step = run(engine, batches, 3, 9) / 9
    count = count_parameters(size.model, size.vocab_size)
    print(f"{name}: {count:,} parameters, {step:.3f} CPU seconds per step")
    found = watchdog_seconds(config, topology, engine, calls)
    for words, seconds in found.items():
        print(f"  {words:16} {seconds * 1e6:7.1f} us  {seconds / step:8.4%}")
    print(f"  {'together':16} {'':10}  {sum(found.values()) / step:8.4%}")
    print(f"  update, checked before over unchecked: {update_ratio(engine, 5):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use a tiny model")
    args = parser.parse_args()
    sizes, calls = (QUICK, 20) if args.quick else (SIZES, CALLS)
    torch.set_num_threads(1)
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    try:
        topology = create_topology(ParallelConfig())
        with tempfile.TemporaryDirectory() as folder:
            for name, size in sizes.items():
                measure(name, size, topology, Path(folder), calls)
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
