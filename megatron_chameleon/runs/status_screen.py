"""The summary of a run for people: a screen of some ten lines, or a single line for a log."""

import textwrap
import time
from collections.abc import Iterator, Mapping

from megatron_chameleon.runs.status import RunStatus
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.wording import counted, format_bytes, format_duration

LABEL_COLUMNS = 14
NARROWEST = 40
LONGEST_TEXT = 400
LITTLE_ROOM = 0.03
"""Share of the disk below which its line warns."""
MEANINGS = {
    "running": "running",
    "finished": "finished: all steps are done",
    "stopped": "stopped by a signal; the same command goes on",
    "failed": "ended by an error",
    "hung": "ended because it hung",
    "died": "not running: it ended without a word, as after kill -9 or a lack of memory",
    "silent": "it may run, or have ended without a word",
    "ended": "not running",
    "new": "has not done a step yet",
    "unknown": "nobody can tell whether it runs",
}


def status_screen(status: RunStatus, width: int) -> str:
    """The screen of a run, in lines of at most ``width`` columns."""
    width = max(NARROWEST, width)
    lines = textwrap.wrap(f"{escape_line(status.name)}: {_headline(status)}", width) or [""]
    for label, text in _rows(status):
        shown = escape_line(text)[:LONGEST_TEXT]
        lines += textwrap.wrap(
            shown,
            width,
            initial_indent=f"  {label:<{LABEL_COLUMNS - 2}}",
            subsequent_indent=" " * LABEL_COLUMNS,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def status_line(status: RunStatus) -> str:
    """One line, for a log that is written every few seconds."""
    parts = [status.state, _steps(status)]
    parts.append(f"loss {_losses(status.loss)}")
    if status.held_out:
        parts.append(f"held out {_losses(status.held_out)}")
    if status.is_stalled:
        parts.append(f"no step for {format_duration(status.last_step_seconds or 0)}")
    if status.alarms:
        parts.append(counted(status.alarms, "alarm"))
    clock = time.strftime("%H:%M:%S", time.localtime(status.time))
    return escape_line(f"{clock} {status.name}: {', '.join(part for part in parts if part)}")


def _headline(status: RunStatus) -> str:
    place = [f"on {status.host}"] if status.host else []
    if status.state == "running" and status.pid:
        place.append(f"pid {status.pid}")
    if status.slurm_job:
        place.append(f"SLURM job {status.slurm_job}")
    if status.since:
        place.append(f"{'since' if status.state == 'running' else 'started'} {status.since}")
    text = MEANINGS.get(status.state, status.state)
    sign = status.sign_of_life_seconds
    if status.state in ("silent", "unknown") and sign is not None:
        text += f"; the last sign of life was {format_duration(sign)} ago"
    return escape_line(f"{text} ({', '.join(place)})" if place else text)


def _rows(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "step", _steps(status) or "none yet"
    if status.step is not None:
        yield "loss", _losses(status.loss)
    if status.held_out:
        yield "held out", _held_out(status.held_out)
    if speed := _speed(status):
        yield "speed", speed
    if status.state in ("running", "silent", "unknown") and status.last_step_seconds is not None:
        yield "last step", _last_step(status)
    yield "checkpoint", _checkpoint(status)
    if status.alarms:
        last = f"; the last: {status.last_alarm}" if status.last_alarm else ""
        yield "alarms", f"{status.alarms}{last}"
    else:
        yield "alarms", "none"
    if status.starts is not None:
        again = status.starts - 1
        yield "restarts", "none" if not again else f"{again:,}"
    if event := status.last_event:
        yield "last event", _event(event)
    if status.disk_free_bytes is not None and status.disk_total_bytes:
        free, total = status.disk_free_bytes, status.disk_total_bytes
        few = "; little room for checkpoints" if free < LITTLE_ROOM * total else ""
        yield "disk", f"{format_bytes(free)} free of {format_bytes(total)}{few}"
    for problem in status.problems:
        yield "note", problem


def _steps(status: RunStatus) -> str:
    step, steps = status.step, status.steps
    if step is None:
        return f"none of {steps:,}" if steps else ""
    text = f"{step:,}"
    if steps:
        text += f" of {steps:,} ({100 * step / steps:.0f}%)"
    if status.eta_seconds is not None:
        text += f", {format_duration(status.eta_seconds)} left"
    return text


def _losses(values: Mapping[str, float | int | None]) -> str:
    """``3.1023 (text 2.9, image 3.3)``; a dash for what is not known."""
    parts = [f"{name} {_loss(values.get(name))}" for name in ("text", "image")]
    return f"{_loss(values.get('all'))} ({', '.join(parts)})"


def _loss(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def _held_out(values: Mapping[str, float | int | None]) -> str:
    text = f"{_losses(values)} at step {values['step']:,}"
    if values["step"] == values["lowest_step"]:
        return f"{text}, the lowest so far"
    return f"{text}; the lowest was {_loss(values['lowest'])} at step {values['lowest_step']:,}"


def _speed(status: RunStatus) -> str:
    parts = []
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.mfu is not None:
        parts.append(f"MFU {100 * status.mfu:.1f}%")
    if status.median_step_seconds is not None:
        parts.append(f"{_seconds(status.median_step_seconds)} per step")
    return ", ".join(parts)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 60 else format_duration(value)


def _last_step(status: RunStatus) -> str:
    text = f"{format_duration(status.last_step_seconds or 0)} ago"
    if status.is_stalled and status.median_step_seconds is not None:
        usual = _seconds(status.median_step_seconds)
        text += f", where a step takes {usual}: it is saving or sampling, or it hangs"
    return text


def _checkpoint(status: RunStatus) -> str:
    newest = status.checkpoint
    if newest is None:
        return "none yet"
    if not newest["is_whole"]:
        whole = counted(status.checkpoints, "whole one") if status.checkpoints else "no whole one"
        return f"step {newest['step']:,} is not whole; {whole}"
    age = newest["age_seconds"]
    ago = "" if age is None else f", {format_duration(age)} ago"
    return f"step {newest['step']:,}{ago}; {counted(status.checkpoints, 'checkpoint')} kept"


def _event(event: Mapping[str, object]) -> str:
    when = str(event.get("time", ""))[:19].replace("T", " ")
    return f"{event.get('event')} at {when} UTC: {event.get('text', '')}"
