"""Shared by all parts: result rows, timing, memory, and a process group of one process."""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.figures import format_figure
from megatron_chameleon.config.schema import ParallelConfig
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import Topology, create_topology

GIB = 2**30
Figures = dict[str, float | int | str]


class NeedsGpuError(Exception):
    """The machine lacks what the row measures; the text says what is missing."""


class LeftOutError(Exception):
    """The row is not measured, for the reason that the text gives."""


class ToleranceError(Exception):
    """The figures of a row were measured, and one exceeds its tolerance.

    Args:
        figures: All figures of the row.
        text: Says which figure exceeds its tolerance.
    """

    def __init__(self, figures: Figures, text: str) -> None:
        super().__init__(text)
        self.figures = figures


@dataclass
class Row:
    """One line of the tables."""

    part: str
    name: str
    state: str
    """One of ok, failed, out of memory, left out, and needs a GPU."""
    figures: Figures = field(default_factory=dict)
    peak_gib: float | None = None
    """Peak memory: on a GPU what torch allocated, on a CPU the resident set size."""
    seconds: float = 0.0
    """Wall time of the row, including the time to build the model."""
    note: str = ""

    def line(self) -> str:
        """The text that is printed for the row while the parts run."""
        figures = [f"{name} {format_figure(value)}" for name, value in self.figures.items()]
        if self.peak_gib is not None:
            figures.append(f"peak {self.peak_gib:.2f} GiB")
        state = [] if self.state == "ok" else [f"{self.state.upper()}: {self.note}"]
        note = [self.note] if self.note and self.state == "ok" else []
        return f"{self.part:10} {self.name}: {', '.join([*state, *figures, *note])}"


@dataclass
class Context:
    """The settings and files that a part receives.

    Args:
        part: Name of the part.
        tiny: Whether to use sizes at which a CPU runs the same code in seconds.
        rows: File of JSON lines to which rows are appended.
        work: Folder for files that one part leaves for another.
        ceilings: Figures of the part ``ceilings``, by row and figure.
    """

    part: str
    tiny: bool
    rows: Path
    work: Path
    ceilings: dict[str, Figures]

    def ceiling(self, row: str, figure: str) -> float | None:
        """A measured ceiling, or None if it was not measured."""
        value = self.ceilings.get(row, {}).get(figure)
        return None if value is None else float(value)

    def row(
        self, name: str, measure: Callable[[], Figures], note: str = "", *, peak: bool = True
    ) -> Figures | None:
        """Measure one row and write it. An exception becomes the text of the row.

        Args:
            name: Name of the row.
            measure: Returns the figures of the row.
            note: Describes the figures.
            peak: Whether the peak memory of the row is meaningful.

        Returns:
            The figures, or None if there are none.
        """
        result = Row(self.part, name, "ok", note=note)
        start = time.perf_counter()
        try:
            free_memory()
            reset_peak()
            result.figures = measure()
        except Exception as error:
            explain(result, error)
        result.peak_gib = peak_gib() if peak and result.figures else None
        result.seconds = time.perf_counter() - start
        self.write(result)
        return result.figures if result.state == "ok" else None

    def write(self, row: Row) -> None:
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row.line(), flush=True)


def explain(row: Row, error: Exception) -> None:
    """Put an exception into a row."""
    states = {
        NeedsGpuError: "needs a GPU",
        LeftOutError: "left out",
        torch.OutOfMemoryError: "out of memory",
    }
    row.state = states.get(type(error), "failed")
    lines = str(error).strip().splitlines() or [""]
    plain = isinstance(error, NeedsGpuError | LeftOutError | ToleranceError)
    row.note = lines[0] if plain else f"{type(error).__name__}: {lines[0]}"[:300]
    if isinstance(error, ToleranceError):
        row.figures = error.figures
    # the traceback keeps the tensors of its frames alive
    error.__traceback__ = None


def need_gpu(what: str) -> None:
    """Raise if this machine has no GPU; ``what`` says why the row needs one."""
    if not platform.has_gpu():
        raise NeedsGpuError(what)


def layers_by() -> str:
    """Name the library whose layers the engine's model has on this machine."""
    return f"layers by {'Transformer Engine' if platform.has_transformer_engine() else 'torch'}"


def need_fp8() -> None:
    """Raise on a machine without FP8, which is never emulated here."""
    if obstacle := platform.fp8_obstacle():
        raise NeedsGpuError(f"FP8 {obstacle}")


@contextlib.contextmanager
def process_group() -> Iterator[Topology]:
    """The process groups of training, for this process alone."""
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    try:
        yield create_topology(ParallelConfig())
    finally:
        leave_process_group()


def synchronize() -> None:
    if platform.has_gpu():
        torch.cuda.synchronize()


def time_calls(
    call: Callable[..., Any],
    *,
    repeats: int,
    warmup: int = 3,
    setup: Callable[[], Any] | None = None,
) -> list[float]:
    """Time calls of a function: by CUDA events on a GPU, otherwise by the clock.

    Args:
        call: The function to time.
        repeats: Number of timed calls.
        warmup: Number of calls before them that are not timed.
        setup: Makes the argument of each call and is not timed.

    Returns:
        Seconds of each timed call.
    """
    seconds = []
    for number in range(warmup + repeats):
        arguments = () if setup is None else (setup(),)
        synchronize()
        elapsed = _time_call(call, arguments)
        if number >= warmup:
            seconds.append(elapsed)
    return seconds


def _time_call(call: Callable[..., Any], arguments: tuple) -> float:
    if not platform.has_gpu():
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call(*arguments)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def median_and_spread(seconds: list[float]) -> tuple[float, str]:
    """The median, and how far the fastest and the slowest call are from it."""
    median = statistics.median(seconds)
    low, high = (value / median - 1 for value in (min(seconds), max(seconds)))
    return median, f"{low:+.1%} {high:+.1%} of {len(seconds)}"


def free_memory() -> None:
    gc.collect()
    if platform.has_gpu():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if platform.has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return
    # 5 resets VmHWM to the current resident set; a system that refuses keeps the process's peak
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gib() -> float | None:
    if platform.has_gpu():
        return torch.cuda.max_memory_allocated() / GIB
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return None
