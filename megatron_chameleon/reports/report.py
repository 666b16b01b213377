"""The report of a run: one HTML page that needs no other file.

Try it: ``chameleon report runs/digits --output report.html``
"""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_chameleon.pages.elements import Cell, cards, heading, how, notes, table
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.reports.curves import (
    loss_charts,
    marks_of,
    source_chart,
    source_losses,
    speed_charts,
    stability_charts,
    token_chart,
    wants,
)
from megatron_chameleon.reports.findings import headlines, held_out
from megatron_chameleon.reports.formats import NONE, amount, duration, number
from megatron_chameleon.reports.mixture import mixture_section
from megatron_chameleon.reports.modalities import (
    modality_findings,
    modality_section,
    read_checks,
)
from megatron_chameleon.reports.samples import sample_section
from megatron_chameleon.reports.tables import (
    checkpoint_table,
    config_section,
    environment_section,
    event_table,
)
from megatron_chameleon.runs.metrics import Metrics
from megatron_chameleon.runs.run import RunRecord, read_run

LAST_STEPS = 20
"""The last loss is the mean over so many last steps."""
_MOST_SOURCES = 300


def report_page(path: str | Path, origin: Origin) -> tuple[RunRecord, str]:
    """Read a run, and write its page.

    Args:
        path: A run folder, or what lies in it.
        origin: Which command writes it, and when; the rest of it is taken from the run.

    Raises:
        DataError: It is not a run.
    """
    run = read_run(path, wants)
    return run, page(f"Run {run.name}", _body(run), _origin(run, origin))


def _origin(run: RunRecord, origin: Origin) -> Origin:
    """What the run's files say of where it comes from."""
    more = [("folder", str(run.path.resolve())), ("last step", _last_written(run))]
    more += [("trained", run.commands[-1])] if run.commands else []
    return replace(origin, name=run.name, seed=run.seed, more=more)


def _body(run: RunRecord) -> Iterator[str]:
    samples = sample_section(run.path, run.problems)
    checks = read_checks(run)
    modalities = modality_section(run, checks)
    yield notes([*headlines(run), *modality_findings(checks)])
    yield cards(_numbers(run))
    sections: tuple[tuple[str, Callable[[RunRecord], str]], ...] = (
        ("Losses", _losses),
        ("Speed", speed_charts),
        ("Stability", stability_charts),
        ("Data", _data),
        ("Samples", lambda run: samples),
        ("Modalities of answers", lambda run: modalities),
        ("Events and alarms", event_table),
        ("Checkpoints", checkpoint_table),
        ("Config", _config),
        ("Environment", environment_section),
    )
    for title, section in sections:
        yield f"<section>{heading(title)}{section(run)}</section>"


def _last_written(run: RunRecord) -> str:
    """When the run last wrote a step, as far as its files say."""
    try:
        seconds = run.metrics.broken.path.stat().st_mtime
        when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OSError, ValueError, OverflowError):
        return "nobody knows when"
    return f"{when:%Y-%m-%d %H:%M} UTC"


def last_mean(metrics: Metrics, key: str) -> float | None:
    """The mean over the last steps; None if there is none."""
    tail = metrics.finite(key)[1][-LAST_STEPS:]
    return float(tail.mean()) if len(tail) else None


def _numbers(run: RunRecord) -> Iterator[tuple[str, str]]:
    metrics = run.metrics
    planned = "steps" if run.planned_steps is None else f"of {run.planned_steps:,} steps"
    yield f"{metrics.last_step:,}", planned
    yield number(last_mean(metrics, "loss")), f"loss, mean of the last {LAST_STEPS} steps"
    for key, name in (("loss_text", "text loss"), ("loss_image", "image loss")):
        if key in metrics:
            yield number(last_mean(metrics, key)), f"{name}, likewise"
    if found := held_out(metrics):
        yield number(found.last), f"held-out loss at step {found.last_step:,}"
        yield number(found.lowest), f"lowest held-out loss, at step {found.lowest_step:,}"
    speeds = metrics.finite("tokens_per_second")[1]
    yield amount(float(np.median(speeds)) if len(speeds) else None), "tokens per second (median)"
    if len(shares := metrics.finite("mfu")[1]):
        yield f"{100 * float(np.median(shares)):.1f}%", "MFU (median)"
    consumed, trained = metrics.last("consumed_tokens"), metrics.last("trained_tokens")
    yield amount(consumed), "tokens consumed, with padding"
    if trained is not None:
        share = f", {100 * trained / consumed:.1f}%" if consumed else ""
        yield amount(trained), f"tokens in the loss{share}"
    seconds = metrics.finite("step_seconds")[1]
    yield duration(float(seconds.sum()) if len(seconds) else None), "training time"


def _losses(run: RunRecord) -> str:
    text = how(
        "The mean cross-entropy of the tokens that are in the loss. Pale lines show each step,",
        "strong lines a running mean. Dots are measurements on held-out documents.",
    )
    return text + loss_charts(run, marks_of(run)) + source_chart(run.metrics) + _sources(run)


def _sources(run: RunRecord) -> str:
    """Where the held-out loss of each source is lowest and where it stands."""
    rows = []
    for name, key in list(source_losses(run.metrics).items())[:_MOST_SOURCES]:
        if found := held_out(run.metrics, key):
            rise = f"{100 * (found.last / found.lowest - 1):.1f}%" if found.lowest else NONE
            lowest = f"{found.lowest:.4f} at step {found.lowest_step:,}"
            rows.append((name, lowest, f"{found.last:.4f}", rise))
    if not rows:
        return ""
    heads = ("held-out source", Cell("lowest", "n"), Cell("last", "n"), Cell("rise since", "n"))
    return table(heads, rows)


def _data(run: RunRecord) -> str:
    return mixture_section(run) + token_chart(run)


def _config(run: RunRecord) -> str:
    text = how("What differs from the defaults of this version. The whole file is below.")
    return (text if run.config.values else "") + config_section(run)
