"""The tables of a report: events, checkpoints, config and environment."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_chameleon.masking import mask_secrets, masked_values
from megatron_chameleon.pages.elements import Cell, folded, how, preformatted, table
from megatron_chameleon.reports.formats import NONE, number, setting
from megatron_chameleon.runs.records import ENVIRONMENT_FILE, Event, flatten
from megatron_chameleon.runs.run import RunRecord
from megatron_chameleon.wording import counted, format_bytes

MOST_EVENTS = 400
"""Rows of the table; of more, the newest."""
_MOST_SAVES = 10
_MOST_CHECKPOINTS = 200
_MOST_SETTINGS = 500
_LONGEST_TEXT = 400
_LONGEST_CONFIG = 200_000
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_FIRST = ("git_commit", "git_dirty", "megatron_chameleon")


def event_table(run: RunRecord) -> str:
    """Events and alarms, the newest first."""
    known = {event.step for event in run.events.events if event.kind == "alarm"}
    alarms = [
        Event(None, "alarm", alarm["step"], "", _alarm_text(alarm), alarm)
        for alarm in run.alarms.alarms
        if alarm["step"] not in known
    ]
    found = [*run.events.events, *alarms]
    if not found:
        return how("None are recorded. Runs of earlier versions recorded only alarms.")
    saves = sum(event.kind == "save" for event in found)
    if saves > _MOST_SAVES:
        found = [event for event in found if event.kind != "save"]
    found.sort(key=lambda event: (-1 if event.step is None else event.step, _when(event)))
    shown = found[::-1][:MOST_EVENTS]
    left_out = len(found) - len(shown) + run.events.left_out + run.alarms.left_out
    note = how(f"{counted(left_out, 'older row')} left out.") if left_out > 0 else ""
    if saves > _MOST_SAVES:
        note += how(f"{saves:,} saved checkpoints are not listed here.")
    heads = (Cell("step", "n"), "time (UTC)", "event", Cell("what", "long"), "host")
    return table(heads, map(_event_row, shown)) + note


def _when(event: Event) -> str:
    return NONE if event.time is None else f"{event.time:%Y-%m-%d %H:%M:%S}"


def _event_row(event: Event) -> tuple[object, ...]:
    step = NONE if event.step is None else f"{event.step:,}"
    text = mask_secrets(event.text[:_LONGEST_TEXT])
    return step, _when(event), event.kind[:60], text, event.host[:100]


def _alarm_text(alarm: Mapping[str, Any]) -> str:
    def part(key: str) -> str:
        value = alarm.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            return NONE
        return number(float(value), ".4g")

    since = alarm.get("since_step")
    since = f"{since:,}" if type(since) is int and abs(since) < 10**15 else NONE
    return (
        f"output norm from {part('since_output_norm')} at step {since} to {part('output_norm')}, "
        f"loss from {part('since_loss')} to {part('loss')}"
    )


def checkpoint_table(run: RunRecord) -> str:
    """The checkpoints of the current line, then the branches that were abandoned."""
    parts = []
    if run.checkpoints:
        shown = run.checkpoints[-_MOST_CHECKPOINTS:]
        rows = [
            (
                f"{checkpoint.step:,}",
                NONE if checkpoint.saved is None else f"{checkpoint.saved:%Y-%m-%d %H:%M:%S}",
                format_bytes(checkpoint.size_bytes()),
                "" if checkpoint.is_whole else "not whole: being written, or cut off",
            )
            for checkpoint in reversed(shown)
        ]
        parts.append(table((Cell("step", "n"), "saved (UTC)", Cell("size", "n"), ""), rows))
        if (more := len(run.checkpoints) - len(shown)) > 0:
            parts.append(how(f"{counted(more, 'earlier checkpoint')} left out."))
    else:
        parts.append(how("No checkpoints."))
    if run.branches:
        rows_of_branches = [
            (
                branch.name,
                NONE if branch.after_step is None else f"{branch.after_step:,}",
                NONE if branch.last_step is None else f"{branch.last_step:,}",
                branch.since or NONE,
                ", ".join(map(str, branch.checkpoint_steps[:12])) or NONE,
            )
            for branch in run.branches[:_MOST_CHECKPOINTS]
        ]
        heads = (
            *("branch", Cell("after step", "n"), Cell("last step", "n"), "set aside (local time)"),
            "checkpoints",
        )
        text = "The run went back to an earlier checkpoint and left these branches."
        parts += [how(text), table(heads, rows_of_branches)]
    return "".join(parts)


def config_section(run: RunRecord) -> str:
    """What differs from the defaults, then the whole file, folded."""
    if not run.config.values:
        return how("The run has no config that can be read.")
    usual = run.config.changed()
    changed = masked_values(
        {key: value for key, (_, value) in list(usual.items())[:_MOST_SETTINGS]}
    )
    rows = [
        (Cell(key, "code"), Cell(setting(value), "code"), Cell(_default(usual[key][0]), "code"))
        for key, value in changed.items()
    ]
    text = mask_secrets(run.config.text[:_LONGEST_CONFIG])
    more = len(usual) - len(rows)
    note = how(f"{counted(more, 'more key')} in config.yaml.") if more > 0 else ""
    whole = folded("config.yaml", preformatted(text))
    return table(("key", "value", "default"), rows) + note + whole


def _default(value: Any) -> str:
    return NONE if value is None else setting(value)


def environment_values(run: RunRecord) -> dict[str, Any]:
    """What ``environment.json`` says, flat, and without secrets."""
    values = dict(flatten(masked_values(run.environment)))
    commit = run.environment.get("git_commit")
    if isinstance(commit, str) and _COMMIT.fullmatch(commit):
        values["git_commit"] = commit  # 40 digits look like a key of Weights & Biases
    return values


def environment_section(run: RunRecord) -> str:
    """Versions, machine and git commit of the last start."""
    if not run.environment:
        return how(f"The run has no {ENVIRONMENT_FILE} that can be read.")
    values = environment_values(run)
    order = [*(key for key in _FIRST if key in values), *(k for k in values if k not in _FIRST)]
    rows = [
        (Cell(_plain(key), "code"), Cell(setting(values[key])[:_LONGEST_TEXT], "long"))
        for key in order[:_MOST_SETTINGS]
    ]
    notes = list(_environment_notes(run, values))
    return (how(*notes) if notes else "") + table(("what", "value"), rows)


def _environment_notes(run: RunRecord, values: Mapping[str, Any]) -> Iterator[str]:
    starts = len(run.commands)
    if starts > 1:
        yield f"The run was started {starts:,} times; this is its last start."
    if values.get("git_dirty") is True:
        yield "Files of the code had changes that were not committed."
    if "git_commit" not in values:
        yield "An earlier version wrote it, without the git commit."


def _plain(key: str) -> str:
    return key.removeprefix("packages.")
