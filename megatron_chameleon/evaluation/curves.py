"""Reads the metrics of runs and draws their curves.

``metrics.jsonl`` has one JSON object per step. A resumed run may have some steps twice: the last
record of a step counts. An incomplete last line, left by a crash, is ignored. Any other broken line
is an error.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import cannot_read, open_to_read
from megatron_chameleon.json_text import parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
LARGEST_STEP = 10**15
LARGEST_VALUE = 1e30
"""matplotlib takes forever to find ticks for axes that end near the largest numbers."""
LONGEST_LINE_BYTES = 1 << 22
"""The record of a step has some hundred bytes per source and layer."""
DEFAULT_KEYS = ("loss_text", "loss_image", "grad_norm", "learning_rate")
LABELS = {
    "loss": "loss (nats per token)",
    "loss_text": "text loss (nats per token)",
    "loss_image": "image loss (nats per token)",
    "z_loss": "z-loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "step_seconds": "seconds per step",
    "output_norm": "output norm",
    "max_logit": "largest logit",
}
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run, one per step, in the order of the steps.

    Args:
        path: A run folder or a ``metrics.jsonl``.

    Raises:
        DataError: There is no such file, it has no records, or a line before the last is broken.
    """
    file = Path(path)
    file = file / METRICS_FILE if file.is_dir() else file
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = parse_json(line.decode("utf-8", "replace"), where)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                what = "not the record of a step, which is an object with an integer `step`"
                raise DataError(where, what, "Fix or remove the line")
        except DataError as error:
            if not line.endswith(b"\n"):  # the process died while it wrote
                break
            raise DataError(where, error.what, "Fix or remove the line") from error
        records[record["step"]] = record
    if not records:
        raise DataError(str(file), "has no records yet", "Wait for the first step")
    return [records[step] for step in sorted(records)]


def _lines(file: Path) -> Iterator[bytes]:
    with open_to_read(file) as stream:
        try:
            while line := stream.readline(LONGEST_LINE_BYTES):
                if len(line) == LONGEST_LINE_BYTES:
                    what = f"has a line of {LONGEST_LINE_BYTES} bytes or more"
                    raise DataError(str(file), what, "Pass a run folder or a metrics.jsonl")
                yield line
        except OSError as error:
            raise cannot_read(file, error) from error


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, both [points], without steps where it is null or missing.

    Raises:
        DataError: A value is not a number.
    """
    for record in records:
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            what = f"is {value!r:.99} at step {record['step']}, which is not a number"
            raise DataError(f"--keys {key}", what, "Choose another key")
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    points = [(step, value) for step, value in points if abs(step) <= LARGEST_STEP]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array([_as_float(value) for value in values])


def _as_float(value: int | float) -> float:
    """NaN, which is not drawn, for numbers with which the axes could not be divided."""
    return float(value) if abs(value) <= LARGEST_VALUE else math.nan


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last ``window`` values, or over fewer at the start: [points]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curve(
    axes: "Axes", runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, window: int = 1
) -> None:
    """Draw one key of every run into a panel: smoothed values over pale raw values.

    Raises:
        DataError: No run has a value for that key.
    """
    found = False
    for color, (name, records) in zip(_colors(len(runs)), runs.items(), strict=True):
        steps, values = series(records, key)
        if not len(values):
            continue
        found = True
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, window), color=color, linewidth=1.5, label=name)
    if not found:
        names = sorted({k for records in runs.values() for r in records for k in r})
        raise DataError(
            f"--keys {key}", "no run has a value for it", f"Use one of: {', '.join(names)}"
        )
    axes.set_title(LABELS.get(key, key), loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    style(axes)


def style(axes: "Axes") -> None:
    """Give a panel the common look: two spines, a pale grid and small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#a0aec0")


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Sequence[str] = DEFAULT_KEYS,
    window: int = 1,
) -> "Figure":
    """Draw one panel per key, with one line per run.

    Args:
        runs: The records of each run, by the name that the legend shows.
        keys: Keys of the records.
        window: Steps of the running mean; 1 draws the values as they are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, key in zip(grid, keys, strict=False):
        draw_curve(axes, runs, key, window)
    for axes in grid[len(keys) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]
