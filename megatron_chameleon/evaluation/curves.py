"""Draws the curves of runs as a figure.

``megatron_chameleon/runs`` reads the metrics. A picture must not hide that some are missing, so a
broken line, unless it is the incomplete last one, is an error here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.metrics import Metrics, read_metrics, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "validation/loss": "held-out loss (nats per token)",
    "validation/ema_loss": "held-out loss of the average of the weights",
    "validation/perplexity": "held-out perplexity",
}
HELD_OUT = "validation/"
"""How the names of held-out losses begin."""
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


def read_whole_metrics(path: str | Path) -> Metrics:
    """The metrics of a run that has some.

    Args:
        path: A run folder or a ``metrics.jsonl``.

    Raises:
        DataError: There is no such file, it has no records, or a line before the last is broken.
    """
    metrics = read_metrics(Path(path))
    if metrics.broken.first:
        raise metrics.broken.first[0]
    if not len(metrics):
        raise DataError(str(metrics.broken.path), "has no records yet", "Wait for the first step")
    return metrics


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, both [points], without steps where it is null or missing.

    Raises:
        DataError: A value is not a number.
    """
    if key in metrics.not_numbers:
        step, value = metrics.not_numbers[key]
        what = f"is {value} at step {step}, which is not a number"
        raise DataError(f"--keys {key}", what, "Choose another key")
    return metrics.series(key)


def draw_curve(axes: "Axes", runs: Mapping[str, Metrics], key: str, window: int = 1) -> None:
    """Draw one key of every run into a panel: smoothed values over pale raw values.

    The held-out loss of a run that measures it is drawn into the panel of its training loss.

    Raises:
        DataError: No run has a value for that key.
    """
    found = False
    for color, (name, metrics) in zip(_colors(len(runs)), runs.items(), strict=True):
        steps, values = series(metrics, key)
        if not len(values):
            continue
        found = True
        if window > 1 and not key.startswith(HELD_OUT):
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        is_held_out = key.startswith(HELD_OUT)  # measured now and then, without noise
        curve = values if is_held_out else smooth(values, window)
        axes.plot(steps, curve, color=color, linewidth=1.5, label=name)
        if f"{HELD_OUT}{key}" in metrics.keys:
            _draw_held_out(axes, metrics, f"{HELD_OUT}{key}", color)
    if not found:
        names = sorted({key for metrics in runs.values() for key in metrics.keys})
        raise DataError(
            f"--keys {key}", "no run has a value for it", f"Use one of: {', '.join(names)}"
        )
    axes.set_title(LABELS.get(key, key), loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    style(axes)


def _draw_held_out(axes: "Axes", metrics: Metrics, key: str, color: str) -> None:
    """Draw a held-out loss over the training loss of the same kind."""
    steps, values = series(metrics, key)
    line: dict[str, Any] = {"linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 2.5}
    axes.plot(steps, values, color=color, **line, label="_nolegend_")
    if axes.get_legend() is None and len(values):
        from matplotlib.lines import Line2D

        handle = Line2D([], [], color="#4a5568", **line)
        axes.legend([handle], ["held-out"], frameon=False, fontsize=8)


def style(axes: "Axes") -> None:
    """Give a panel the common look: two spines, a pale grid and small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#a0aec0")


def draw_curves(
    runs: Mapping[str, Metrics],
    keys: Sequence[str] = DEFAULT_KEYS,
    window: int = 1,
) -> "Figure":
    """Draw one panel per key, with one line per run.

    Args:
        runs: The metrics of each run, by the name that the legend shows.
        keys: Keys of the metrics.
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
