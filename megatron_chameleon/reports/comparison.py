"""Several runs side by side: their last values, their curves, and how they were set up.

Try it: ``chameleon compare runs/a runs/b --x trained_tokens``
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.masking import mask_secrets, masked_values
from megatron_chameleon.pages.charts import COLORS, Chart, Line
from megatron_chameleon.pages.elements import Cell, choice, heading, how, notes, table
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.reports.curves import VIEWS, smoothing_window
from megatron_chameleon.reports.findings import held_out
from megatron_chameleon.reports.formats import NONE, amount, duration, number, setting
from megatron_chameleon.reports.report import last_mean
from megatron_chameleon.reports.tables import environment_values
from megatron_chameleon.runs.metrics import Metrics, smooth
from megatron_chameleon.runs.records import default_of
from megatron_chameleon.runs.run import RunRecord

AXES = {
    "step": ("step", "step"),
    "tokens": ("consumed_tokens", "tokens consumed, with padding"),
    "trained_tokens": ("trained_tokens", "tokens in the loss"),
}
"""What ``--x`` takes: the metric, and the label of the axis."""
MOST_RUNS = 30
_CURVES = (
    ("loss", "Training loss", "nats per token"),
    ("validation/loss", "Held-out loss", "nats per token"),
    ("loss_text", "Text loss", "nats per token"),
    ("loss_image", "Image loss", "nats per token"),
    ("validation/loss_text", "Held-out text loss", "nats per token"),
    ("validation/loss_image", "Held-out image loss", "nats per token"),
)
_OTHERS = (
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("output_norm", "Output norm", "of the last layer"),
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("mfu", "MFU", "share of the peak"),
    ("global_batch_size", "Global batch size", "sequences"),
)
_MOST_DIFFERENCES = 1000
_OWN_KEYS = ("logging.run_dir",)
"""Keys that differ between any two runs."""
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class SettingDifference:
    """A setting in which the runs are not all the same."""

    key: str
    values: list[str]
    """Of each run."""


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: that of its folder, or its path where two names are the same."""
    names = [run.name for run in runs]
    names = [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]
    return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]


def along(metrics: Metrics, key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve of a metric: places on the axis, ascending, and values, both [points].

    Args:
        metrics: Of the run.
        key: The metric.
        axis: A key of ``AXES``. Steps whose place is not known are left out.
    """
    steps, values = metrics.finite(key)
    if axis == "step":
        return steps.astype(np.float64), values
    places = metrics.at(AXES[axis][0], steps)
    known = np.isfinite(places)
    order = np.argsort(places[known], kind="stable")
    return places[known][order], values[known][order]


def missing_axis(runs: Sequence[RunRecord], axis: str) -> DataError | None:
    """The error to raise for a run that does not know its places on the axis; None if all do."""
    key = AXES[axis][0]
    for run in runs:
        if len(run.metrics) and key != "step" and not len(run.metrics.finite(key)[0]):
            what = f"its metrics have no {key}"
            others = [name for name in AXES if name != axis]
            return DataError(str(run.path), what, f"Use --x {' or '.join(others)}")
    return None


def summary_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """What the table of a comparison shows: a label, and a text for each run."""
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("steps", lambda run: f"{run.metrics.last_step:,}"),
        ("tokens consumed", lambda run: amount(run.metrics.last("consumed_tokens"))),
        ("tokens in the loss", lambda run: amount(run.metrics.last("trained_tokens"))),
        ("loss, last 20 steps", lambda run: number(last_mean(run.metrics, "loss"))),
        ("text loss, last 20 steps", lambda run: number(last_mean(run.metrics, "loss_text"))),
        ("image loss, last 20 steps", lambda run: number(last_mean(run.metrics, "loss_image"))),
        ("lowest loss of a step", lambda run: _lowest(run.metrics)),
        ("held-out loss, last", lambda run: _held_out(run.metrics, is_lowest=False)),
        ("held-out loss, lowest", lambda run: _held_out(run.metrics, is_lowest=True)),
        ("tokens per second (median)", lambda run: amount(_median(run, "tokens_per_second"))),
        ("MFU (median)", lambda run: number(_median(run, "mfu"), ".3f")),
        ("training time", lambda run: duration(_sum(run, "step_seconds"))),
        ("alarms", lambda run: f"{len(run.alarms.alarms) + run.alarms.left_out:,}"),
    ]
    found = [(label, [value(run) for run in runs]) for label, value in rows]
    return [(label, texts) for label, texts in found if set(texts) != {NONE}]


def _lowest(metrics: Metrics) -> str:
    steps, values = metrics.finite("loss")
    if not len(steps):
        return NONE
    place = int(np.argmin(values))
    return f"{values[place]:.4f} at {int(steps[place]):,}"


def _held_out(metrics: Metrics, is_lowest: bool) -> str:
    found = held_out(metrics)
    if found is None:
        return NONE
    if is_lowest:
        risen = ", risen since" if found.has_risen else ""
        return f"{found.lowest:.4f} at {found.lowest_step:,}{risen}"
    return f"{found.last:.4f} at {found.last_step:,}"


def _median(run: RunRecord, key: str) -> float | None:
    values = run.metrics.finite(key)[1]
    return float(np.median(values)) if len(values) else None


def _sum(run: RunRecord, key: str) -> float | None:
    values = run.metrics.finite(key)[1]
    return float(values.sum()) if len(values) else None


def config_differences(runs: Sequence[RunRecord]) -> list[SettingDifference]:
    """The keys in which the configs differ. A key that one lacks has its default there."""
    configs = [masked_values(run.config.values) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    found = []
    for key in keys:
        if key in _OWN_KEYS:
            continue
        values = [config[key] if key in config else _default(key) for config in configs]
        if any(value != values[0] for value in values[1:]) and not _is_usual_entry(key, values):
            found.append(SettingDifference(key, [_shown(value) for value in values]))
    return found


def _is_usual_entry(key: str, values: Sequence[Any]) -> bool:
    """Whether some runs lack an entry of a list, and the others have it at its default."""
    present = [value for value in values if not isinstance(value, _Absent)]
    return len(present) < len(values) and all((True, v) == default_of(key) for v in present)


class _Absent:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Absent)

    __hash__ = None  # type: ignore[assignment]


def _default(key: str) -> Any:
    is_known, value = default_of(key)
    return value if is_known and "[" not in key else _Absent()


def _shown(value: Any) -> str:
    return NONE if isinstance(value, _Absent) else setting(value)


def environment_differences(runs: Sequence[RunRecord]) -> list[SettingDifference]:
    """The same for ``environment.json``: versions, machine and git commit."""
    found = [environment_values(run) for run in runs]
    keys = dict.fromkeys(key for values in found for key in values)
    differences = []
    for key in keys:
        values = [values.get(key, _Absent()) for values in found]
        if any(value != values[0] for value in values[1:]):
            name = key.removeprefix("packages.")
            differences.append(SettingDifference(name, [_shown(value) for value in values]))
    return differences


def comparison_text(runs: Sequence[RunRecord]) -> str:
    """The comparison as tables for a terminal."""
    names = run_names(runs)
    parts = [_text_table(["", *names], [[label, *texts] for label, texts in summary_rows(runs)])]
    for title, found in _difference_groups(runs):
        rows = [[d.key, *d.values] for d in found[:_MOST_DIFFERENCES]]
        parts.append(_text_table([title, *names], rows) if rows else f"{title}: no differences")
        if len(found) > _MOST_DIFFERENCES:
            parts.append(f"... and {len(found) - _MOST_DIFFERENCES:,} more")
    return "\n\n".join(parts)


def _difference_groups(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[SettingDifference]]]:
    yield "config", config_differences(runs)
    yield "environment", environment_differences(runs)


def _text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_cut(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def comparison_page(runs: Sequence[RunRecord], axis: str, origin: Origin) -> str:
    """The comparison as one HTML page.

    Args:
        runs: Up to ``MOST_RUNS``.
        axis: A key of ``AXES``.
        origin: Which command writes it, and when.
    """
    names = run_names(runs)
    more = [("folders", ", ".join(str(run.path.resolve()) for run in runs))]
    seeds = [(n, s) for n, run in zip(names, runs, strict=True) if (s := run.seed) is not None]
    more += [("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds))] if seeds else []
    where = replace(origin, name=", ".join(names), more=more)
    return page(f"Comparison of {len(runs)} runs", _body(runs, axis), where)


def _body(runs: Sequence[RunRecord], axis: str) -> Iterator[str]:
    names = run_names(runs)
    problems = [f"{name}: {text}" for name, run in zip(names, runs, strict=True)
                for text in run.problems[:5]]  # fmt: skip
    yield notes((mask_secrets(text), "warn") for text in problems)
    heads = [Cell(""), *(Cell(name, "n") for name in names)]
    yield table(heads, [(label, *texts) for label, texts in summary_rows(runs)])
    yield heading("Losses")
    views = [
        (label, _charts(runs, names, _CURVES, axis, log_x, log_y)) for label, log_x, log_y in VIEWS
    ]
    yield choice("loss", views)
    yield heading("Speed and stability")
    yield _charts(runs, names, _OTHERS, axis, False, False)
    for title, found in _difference_groups(runs):
        yield heading(f"Differences of {title}")
        if not found:
            yield how("None.")
            continue
        rows = [
            (Cell(d.key, "code"), *(Cell(value, "code") for value in d.values))
            for d in found[:_MOST_DIFFERENCES]
        ]
        yield table(("key", *names), rows)


def _charts(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    panels: Sequence[tuple[str, str, str]],
    axis: str,
    log_x: bool,
    log_y: bool,
) -> str:
    found = []
    for key, title, unit in panels:
        lines = [
            line
            for color, (name, run) in enumerate(zip(names, runs, strict=True))
            if (line := _line(run.metrics, key, axis, name, color)) is not None
        ]
        if lines:
            label = AXES[axis][1]
            chart = Chart(title, lines, unit, x_label=label, log_x=log_x, log_y=log_y)
            found.append(chart.html())
    return f'<div class="charts">{"".join(found)}</div>' if found else "<p>No values.</p>"


def _line(metrics: Metrics, key: str, axis: str, name: str, color: int) -> Line | None:
    places, values = along(metrics, key, axis)
    if not len(places):
        return None
    if key.startswith("validation/"):
        return Line(name, places, values, color, "dots")
    if key != "learning_rate":
        values = smooth(values, smoothing_window(len(values)))
    return Line(name, places, values, color, "curve" if color < COLORS else "dash")
