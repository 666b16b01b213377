"""Time and memory of Chameleon's loss with z-loss, against megatron-core's cross-entropy.

    python -W ignore -m benchmarks.training.loss           # 2^28 logits in two shapes; some minutes
    python -W ignore -m benchmarks.training.loss --quick   # tiny sizes, as a check

Both compute a forward and a backward pass over the same logits in a process group of one process,
with one thread. The two losses are compared before anything is timed.

- Time is the median of repeats that alternate in one process, after one that is not counted. Each
  repeat gets a new copy of the logits, because both losses overwrite fp32 logits. Making the copy
  is not timed.
- Memory is measured in a new process for each loss. It is the growth of the peak resident set size
  (``VmHWM``) after the logits were made.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_chameleon.model.loss import vocab_parallel_cross_entropy
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron

Z_LOSS = 1e-5
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((65_536, 4_096), (4_096, 65_536))


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab_size: int
    dtype: str

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw logits [tokens, 1, vocabulary], labels and loss mask [tokens, 1]."""
        torch.manual_seed(0)
        # in place, because a temporary would raise the peak from which memory is measured
        logits = torch.empty(self.tokens, 1, self.vocab_size, dtype=DTYPES[self.dtype])
        logits.normal_(std=3.0)
        labels = torch.randint(self.vocab_size, (self.tokens, 1))
        return logits, labels, torch.ones(self.tokens, 1)


QUICK = Case(256, 64, "fp32")


def ours(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss as ``MegatronEngine`` computes it."""
    group = parallel_state.get_tensor_model_parallel_group()
    cross_entropy, log_z, _ = vocab_parallel_cross_entropy(logits, labels, group)
    return ((cross_entropy + Z_LOSS * log_z.square()) * mask).sum()


def megatron(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """megatron-core's cross-entropy, without a z-loss."""
    return (tensor_parallel.vocab_parallel_cross_entropy(logits, labels) * mask).sum()


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"ours": ours, "megatron": megatron}


def step(name: str, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> float:
    """Run forward and backward, and return the loss."""
    loss = LOSSES[name](logits.requires_grad_(), labels, mask)
    torch.autograd.grad(loss, logits)
    return loss.item()


def measure_times(case: Case, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Measure the median seconds of each loss, and exit if the two losses differ."""
    source, labels, mask = case.draw()
    values: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for repeat in range(repeats + 1):
        for name in LOSSES:
            logits = source.clone()
            start = clock()
            values[name] = step(name, logits, labels, mask)
            if repeat:
                seconds[name].append(clock() - start)
            del logits
    z_term = Z_LOSS * source.float().logsumexp(-1).square().sum().item()
    # sums over the tokens of fp32 losses, each of which is exact to about 1e-7
    if abs(values["ours"] - z_term - values["megatron"]) > 1e-5 * values["megatron"]:
        raise SystemExit(f"the losses differ: {values}, z-loss {z_term}")
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes() -> int:
    """The peak resident set size of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def print_memory(name: str, case: Case) -> None:
    """Print the bytes that one pass adds to the peak. This runs in a new process."""
    step(name, *Case(8, 8, case.dtype).draw())  # load first what is loaded on first use
    arguments = case.draw()
    before = peak_bytes()
    step(name, *arguments)
    print(peak_bytes() - before)


def measure_memory(case: Case) -> dict[str, int]:
    """Measure the bytes of each loss beyond its logits, each in its own process."""
    found = {}
    for name in LOSSES:
        words = [str(case.tokens), str(case.vocab_size), case.dtype]
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.training.loss",
            "--memory-of",
            name,
            "--case",
            *words,
        ]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = int(result.stdout.split()[-1])
    return found


def report(case: Case, repeats: int, clock: Callable[[], float]) -> None:
    seconds, memory = measure_times(case, repeats, clock), measure_memory(case)
    # below a MiB, the resident set shows pages of the allocator rather than the loss
    measurable = min(memory.values()) > MIB
    memory_ratio = f"{memory['ours'] / memory['megatron']:6.3f}" if measurable else "     -"
    title = f"{case.tokens:,} tokens x {case.vocab_size:,} {case.dtype}"
    print(
        f"{title:32} {seconds['ours']:8.3f} s {seconds['megatron']:8.3f} s "
        f"{seconds['ours'] / seconds['megatron']:6.3f}   "
        f"{memory['ours'] / MIB:8.1f} MiB {memory['megatron'] / MIB:8.1f} MiB "
        f"{memory_ratio}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a machine that others also use"
    )
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    parallel_state.initialize_model_parallel()
    try:
        if args.memory_of:
            print_memory(args.memory_of, Case(int(args.case[0]), int(args.case[1]), args.case[2]))
            return
        print(f"{'':32} {'ours':>10} {'megatron':>10} {'ratio':>6}   {'ours':>12} {'megatron':>12}")
        if args.quick:
            report(QUICK, 2, clock)
            return
        for dtype in args.dtypes:
            for tokens, vocab_size in SHAPES:
                report(Case(tokens, vocab_size, dtype), args.repeats, clock)
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
