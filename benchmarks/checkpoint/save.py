"""The cost of a checkpoint: how long training waits for it, and how fast the steps meanwhile are.

    python -W ignore -m benchmarks.checkpoint.save

Steps without a save, steps while one is written (asynchronous), and whole synchronous saves
alternate. Training is one process with one thread and random tokens. The threads that write have
the other core.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.training.train_step import Size, draw_batches, make_config
from megatron_chameleon.checkpoint.state.save import Saver
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.engines.megatron import MegatronEngine

SIZE = Size(ModelConfig(8, 512, 1376, 8, seq_length=256), 8192, 2)
QUICK = Size(ModelConfig(2, 32, 64, 2, seq_length=32), 128, 2)


class Bench:
    """An engine, its steps and its saves.

    Args:
        size: Size of the model.
        folder: Folder for the checkpoints.
    """

    def __init__(self, size: Size, folder: Path) -> None:
        self.config = make_config(size, "fp32")
        self.engine = MegatronEngine(
            self.config, size.vocab_size, create_topology(self.config.parallel)
        )
        self._batches = draw_batches(size, 1)
        self._saver = Saver(folder, self.engine, lambda path: None)
        self._steps = 0

    def step(self) -> float:
        """Run a training step and return its seconds."""
        start = time.perf_counter()
        self._steps += 1
        self.engine.train_step(self._steps, self._batches)
        return time.perf_counter() - start

    def save(self, *, is_async: bool) -> float:
        """Save, and return the seconds that training waits."""
        self.config.checkpoint.async_save = is_async
        start = time.perf_counter()
        self._saver.save(self._steps, {})
        return time.perf_counter() - start

    def steps_beside_a_save(self) -> list[float]:
        """Train until the checkpoint is complete, and return the seconds of each step."""
        seconds = []
        while self._saver._pending is not None:
            start = time.perf_counter()
            self.step()
            self._saver.poll()
            seconds.append(time.perf_counter() - start)
        return seconds


def measure(bench: Bench, rounds: int) -> None:
    """Measure and print the table."""
    plain, beside, waits, synchronous = [], [], [], []
    bench.step()
    bench.save(is_async=False)
    for _ in range(rounds):
        plain += [bench.step() for _ in range(3)]
        waits.append(bench.save(is_async=True))
        beside += bench.steps_beside_a_save()
        synchronous.append(bench.save(is_async=False))
    step = statistics.median(plain)
    print(f"a step without a save: {step:.3f} s")
    print(f"a step while a checkpoint is written: {statistics.median(beside):.3f} s,", end=" ")
    print(f"{statistics.median(beside) / step:.2f} of that; by means {_mean_ratio(beside, plain)}")
    print(f"the training waits {statistics.median(waits):.3f} s for the copy of an async save,")
    print(f"and {statistics.median(synchronous):.3f} s for a synchronous save")
    print(f"{len(beside)} steps during {rounds} saves")


def _mean_ratio(beside: list[float], plain: list[float]) -> str:
    return f"{statistics.fmean(beside) / statistics.fmean(plain):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="use a tiny model, to check that the script runs"
    )
    parser.add_argument("--work", type=Path, default=None, help="a folder on the disk to measure")
    args = parser.parse_args()
    size, rounds = (QUICK, 1) if args.quick else (SIZE, 5)
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        parameters = count_parameters(size.model, size.vocab_size)
        print(f"{parameters:,} parameters in fp32: {12 * parameters / 1e6:,.0f} MB with moments")
        measure(Bench(size, Path(folder)), rounds)
    leave_process_group()


if __name__ == "__main__":
    main()
