"""The charts of a report: losses, speed, stability and tokens, with marks at what happened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chameleon.pages.axes import MOST_POINTS, thin
from megatron_chameleon.pages.charts import Chart, ChartMark, Line
from megatron_chameleon.pages.elements import choice
from megatron_chameleon.reports.findings import held_out
from megatron_chameleon.runs.metrics import Metrics, smooth
from megatron_chameleon.runs.run import RunRecord

SHOWN_KEYS = (
    *("loss", "loss_text", "loss_image", "grad_norm", "learning_rate", "output_norm", "max_logit"),
    *("tokens_per_second", "mfu", "step_seconds", "consumed_tokens", "consumed_samples"),
    *("trained_tokens", "global_batch_size", "z_loss", "max_attention_logit"),
    *("reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward"),
)
"""Metrics that a report or a comparison shows, besides those of ``validation/``."""
VIEWS = (
    ("linear", False, False),
    ("log loss", False, True),
    ("log loss and steps", True, True),
)
_LOSSES = (("loss", "Loss"), ("loss_text", "Text loss"), ("loss_image", "Image loss"))
_REWARDS = (("reward_margin", "Reward margin"), ("reward_accuracy", "Reward accuracy"))
"""Of pairs of answers. They may be negative, so they have one view."""
_SPEED = (
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("mfu", "MFU", "share of the peak"),
    ("step_seconds", "Time per step", "seconds"),
)
_STABILITY = (
    ("grad_norm", "Gradient norm", "before clipping"),
    ("learning_rate", "Learning rate", ""),
    ("output_norm", "Output norm", "of the last layer"),
    ("max_logit", "Largest logit", ""),
    ("max_attention_logit", "Largest attention logit", ""),
    ("z_loss", "z-loss", ""),
    ("global_batch_size", "Global batch size", "sequences"),
)
_MOST_SOURCES = 6
_FEWEST_TO_SMOOTH = 50
_EXACT = ("learning_rate", "global_batch_size", "consumed_tokens", "trained_tokens")
"""Metrics without noise."""
_KEPT_POINTS = 4 * MOST_POINTS


def wants(key: str) -> bool:
    """Whether a metric is shown; the others need not be kept."""
    return key in SHOWN_KEYS or key.startswith("validation/")


def smoothing_window(points: int) -> int:
    """Over how many steps a curve is smoothed: a hundredth of them, from 5 to 500; 1 for few."""
    return 1 if points < _FEWEST_TO_SMOOTH else min(max(points // 100, 5), 500)


def metric_lines(metrics: Metrics, key: str, name: str, color: int = 0) -> list[Line]:
    """The curve of a metric: smoothed, over the pale values of each step."""
    steps, values = metrics.finite(key)
    window = 1 if key in _EXACT else smoothing_window(len(values))
    if window == 1:
        return [_drawable(Line(name, steps, values, color))]
    strong = _drawable(Line(name, steps, smooth(values, window), color))
    return [_drawable(Line("", steps, values, color, "raw")), strong]


def _drawable(line: Line) -> Line:
    """A curve of few points that looks the same on both kinds of axes.

    What is computed on it later, for each view, then takes little time and memory.
    """
    if len(line.x) <= 2 * _KEPT_POINTS:
        return line
    x = line.x.astype(np.float64)
    logs = np.log1p(x)
    chosen = np.union1d(thin(x, line.y, _KEPT_POINTS), thin(logs, line.y, _KEPT_POINTS))
    return replace(line, x=line.x[chosen], y=line.y[chosen])


def loss_charts(run: RunRecord, marks: Sequence[ChartMark]) -> str:
    """Training and held-out loss in one chart, then by modality; linear and logarithmic."""
    charts = [chart for key, title in _LOSSES if (chart := _loss_chart(run.metrics, key, title))]
    if not charts:
        return '<p class="pale">No losses yet.</p>'
    first, *others = charts
    first = replace(first, marks=marks, is_tall=True)
    others = [replace(chart, marks=_lowest(run.metrics, f"{_key(chart)}")) for chart in others]
    views = []
    for label, log_x, log_y in VIEWS:
        drawn = [replace(chart, log_x=log_x, log_y=log_y).html() for chart in (first, *others)]
        views.append((label, f'{drawn[0]}<div class="charts">{"".join(drawn[1:])}</div>'))
    rewards = [
        replace(chart, unit="").html()
        for key, title in _REWARDS
        if (chart := _loss_chart(run.metrics, key, title))
    ]
    below = f'<div class="charts">{"".join(rewards)}</div>' if rewards else ""
    return choice("loss", views) + below


def _key(chart: Chart) -> str:
    return next(key for key, title in _LOSSES if title == chart.title)


def _loss_chart(metrics: Metrics, key: str, title: str) -> Chart | None:
    if key not in metrics and f"validation/{key}" not in metrics:
        return None
    lines = metric_lines(metrics, key, "training", 0) if key in metrics else []
    steps, values = metrics.finite(f"validation/{key}")
    if len(steps):
        lines.append(Line("held-out", steps, values, 1, "dots"))
    return Chart(title, lines, "nats per token")


def _lowest(metrics: Metrics, key: str = "loss") -> list[ChartMark]:
    found = held_out(metrics, f"validation/{key}")
    if found is None or found.measurements < 2:
        return []
    text = f"held-out loss is lowest at step {found.lowest_step:,}: {found.lowest:.4f}"
    return [ChartMark(found.lowest_step, "lowest", text)]


def marks_of(run: RunRecord) -> list[ChartMark]:
    """Restarts, alarms, checkpoints, the stage change, and the lowest held-out loss."""
    marks = _lowest(run.metrics)
    for event in run.events.events:
        if event.step and event.kind in ("start", "restart", "rollback"):
            marks.append(ChartMark(event.step, "restart", f"{event.kind} at step {event.step:,}"))
    for alarm in run.alarms.alarms:
        marks.append(ChartMark(alarm["step"], "alarm", f"alarm at step {alarm['step']:,}"))
    for checkpoint in run.checkpoints:
        if checkpoint.is_whole:
            text = f"checkpoint of step {checkpoint.step:,}"
            marks.append(ChartMark(checkpoint.step, "checkpoint", text))
    step = stage2_step(run)
    if step is not None:
        marks.append(ChartMark(step, "stage", f"stage 2 begins at step {step:,}"))
    return marks


def stage2_step(run: RunRecord) -> int | None:
    """The first step of stage 2; None if the run has none, or it is not known.

    The newest checkpoint knows the sample at which it begins; the config says where it should.
    """
    if not any(key.startswith("data.stage2[") for key in run.config.values):
        return None
    sample = _stage2_sample(run)
    steps, samples = run.metrics.finite("consumed_samples")
    if sample is not None and len(steps):
        later = np.flatnonzero(samples > sample)
        return int(steps[later[0]]) if len(later) else None
    tokens = run.config.get("data.stage1_tokens")
    if isinstance(tokens, int | float):
        steps, consumed = run.metrics.finite("consumed_tokens")
        later = np.flatnonzero(consumed > tokens)
        return int(steps[later[0]]) if len(later) else None
    share = run.config.get("data.stage1_fraction")
    if run.planned_steps is None or not isinstance(share, int | float):
        return None
    return round(share * run.planned_steps) + 1


def _stage2_sample(run: RunRecord) -> int | None:
    whole = [checkpoint for checkpoint in run.checkpoints if checkpoint.is_whole]
    state = whole[-1].state() if whole else {}
    try:
        sample = state["data"]["entries"][-1]["weights"]["stage1_samples"]
    except (KeyError, IndexError, TypeError):
        return None
    return sample if type(sample) is int and sample > 0 else None


def speed_charts(run: RunRecord) -> str:
    return _panels(run.metrics, _SPEED)


def stability_charts(run: RunRecord) -> str:
    return _panels(run.metrics, _STABILITY)


def _panels(metrics: Metrics, panels: Sequence[tuple[str, str, str]]) -> str:
    """A small chart for each metric that has values; one that never changes is left out, except
    where that is what it should do."""
    found = []
    for key, title, unit in panels:
        values = metrics.finite(key)[1]
        if not len(values) or (key == "global_batch_size" and np.ptp(values) == 0):
            continue
        found.append(Chart(title, metric_lines(metrics, key, ""), unit).html())
    return f'<div class="charts">{"".join(found)}</div>' if found else "<p>No values yet.</p>"


def token_chart(run: RunRecord) -> str:
    """Tokens that were consumed, and those of them that counted in the loss."""
    lines = []
    for color, (key, name) in enumerate(
        (("consumed_tokens", "consumed, with padding"), ("trained_tokens", "in the loss"))
    ):
        if key in run.metrics:
            lines += metric_lines(run.metrics, key, name, color)
    return Chart("Tokens so far", lines).html() if lines else ""


def source_losses(metrics: Metrics) -> Mapping[str, str]:
    """The data sources that have a held-out loss of their own, and its key, by name."""
    found = {}
    for key in metrics.keys:
        if key.startswith("validation/") and key.endswith("/loss") and key.count("/") > 1:
            found[key.removeprefix("validation/").removesuffix("/loss")] = key
    return dict(sorted(found.items()))


def source_chart(metrics: Metrics) -> str:
    """The held-out loss of each source, if there are several; of many, only the first ones."""
    lines = list(_source_lines(metrics))
    if len(lines) < 2:
        return ""
    return Chart("Held-out loss by source", lines, "nats per token").html()


def _source_lines(metrics: Metrics) -> Iterator[Line]:
    for color, (name, key) in enumerate(list(source_losses(metrics).items())[:_MOST_SOURCES]):
        yield Line(name, *metrics.finite(key), color, "dots")
