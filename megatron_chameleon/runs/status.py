"""How a run stands: a summary of its folder, for ``chameleon status``.

Only the end of ``metrics.jsonl`` is parsed, and what was read of held-out losses is remembered, so
that a run of a million steps can be looked at every few seconds.
"""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.errors import ChameleonError, DataError, one_line
from megatron_chameleon.files import open_to_read
from megatron_chameleon.runs.checkpoints import RunCheckpoint, list_checkpoints
from megatron_chameleon.runs.holder import Holder, find_holder
from megatron_chameleon.runs.lines import LONGEST_LINE_BYTES, parse_object, read_backwards
from megatron_chameleon.runs.records import (
    ALARMS_FILE,
    CONFIG_FILE,
    EVENTS_FILE,
    STARTS,
    Event,
    RecordedConfig,
    read_alarms,
    read_commands,
    read_events,
    read_recorded_config,
)
from megatron_chameleon.runs.run import find_run

T = TypeVar("T")

RECENT_STEPS = 200
"""Steps from which times are taken."""
STALL_FACTOR, STALL_SECONDS = 10.0, 60.0
"""A run is called stalled if its last step is so many usual steps ago, and so many seconds."""
HELD_OUT = "validation/loss"
STATES = {"finish": "finished", "stop": "stopped", "error": "failed", "hang": "hung"}
"""What a run is that is not alive, by its last event."""
_MOST_RUNS = 1000
_SKIPPED = ("checkpoints", "samples", "logs", "tensorboard", "wandb", "profile")


@dataclass
class RunStatus:
    """How a run stands. What is not known is None; docs/runs.md explains each field."""

    run: str
    name: str
    time: float
    state: str
    """running, finished, stopped, failed, hung, died, silent, ended, new or unknown."""
    host: str | None = None
    pid: int | None = None
    slurm_job: str | None = None
    since: str | None = None
    sign_of_life_seconds: float | None = None
    step: int | None = None
    steps: int | None = None
    eta_seconds: float | None = None
    last_step_seconds: float | None = None
    """How long ago the last step was."""
    median_step_seconds: float | None = None
    is_stalled: bool = False
    loss: dict[str, float | None] = field(default_factory=dict)
    held_out: dict[str, float | int | None] = field(default_factory=dict)
    tokens_per_second: float | None = None
    mfu: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    consumed_tokens: int | None = None
    trained_tokens: int | None = None
    checkpoint: dict[str, Any] | None = None
    checkpoints: int = 0
    alarms: int = 0
    last_alarm: str | None = None
    starts: int | None = None
    last_event: dict[str, Any] | None = None
    disk_free_bytes: int | None = None
    disk_total_bytes: int | None = None
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return asdict(self)


class StatusReader:
    """Reads how runs stand, again and again."""

    def __init__(self) -> None:
        self._held_out: dict[Path, _HeldOut] = {}

    def read(self, run: Path) -> RunStatus:
        """How a run stands now. Whatever is missing or damaged is named in ``problems``.

        Args:
            run: From ``find_runs``.
        """
        problems: list[str] = []
        config = _read(
            lambda: read_recorded_config(run), RecordedConfig({}, ""), CONFIG_FILE, problems
        )
        if not os.path.lexists(run / CONFIG_FILE):
            problems[:] = [f"{CONFIG_FILE} is missing"]
        records = list(islice(read_backwards(run / METRICS_FILE), RECENT_STEPS))
        last = max(records, key=lambda record: record["step"], default={})
        seconds = [s for s in (_number(r, "step_seconds") for r in records) if s and s > 0]
        usual = statistics.median(seconds) if seconds else None
        holder = find_holder(run, usual or 0.0)
        log = _read(lambda: read_events(run), None, EVENTS_FILE, problems)
        events = log.events if log else []
        steps = config.get("training.steps") if config.values else None
        status = RunStatus(
            run=str(run.absolute()),
            name=run.resolve().name,
            time=round(time.time(), 3),
            state="unknown",
            step=last.get("step"),
            steps=steps if type(steps) is int and steps > 0 else None,
            median_step_seconds=usual,
            problems=problems,
        )
        _add_last_step(status, last)
        _add_holder(status, holder, events)
        _add_times(status, run, seconds)
        held_out = self._held_out.setdefault(run, _HeldOut())
        held_out.read(run / METRICS_FILE)
        status.held_out = held_out.summary()
        _add_checkpoints(status, run)
        _add_alarms(status, run, events)
        _add_starts(status, run, events)
        with suppress(OSError):
            usage = shutil.disk_usage(run)
            status.disk_free_bytes, status.disk_total_bytes = usage.free, usage.total
        return status


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The run folders that paths mean: a run each, or a folder with runs in it.

    Raises:
        DataError: A path is neither.
    """
    found: list[Path] = []
    for path in paths:
        if not path:
            raise DataError("RUN", "it is empty", "Give a run folder, such as runs/default")
        try:
            found.append(find_run(path))
        except DataError:
            below = _runs_below(Path(path))
            if not below:
                raise
            found += below
    return list({run.resolve(): run for run in found}.values())


def _runs_below(folder: Path, depth: int = 2) -> list[Path]:
    """The runs in a folder, in the order of their names, and in the folders of the folder."""
    found: list[Path] = []
    with suppress(OSError, ValueError):
        for path in sorted(folder.iterdir())[:_MOST_RUNS]:
            if path.name.startswith(".") or not path.is_dir() or len(found) >= _MOST_RUNS:
                continue
            # A folder of a run, such as checkpoints/, would be taken for the run that it lies in.
            if (path / METRICS_FILE).exists() or (path / CONFIG_FILE).exists():
                found.append(path)
            elif depth > 1 and path.name not in _SKIPPED:
                found += _runs_below(path, depth - 1)
    return found


def _read(reader: Callable[[], T], empty: T, name: str, problems: list[str]) -> T:
    """What a reader finds in a file of that name; what goes wrong is a problem."""
    try:
        return reader()
    except ChameleonError as error:
        problems.append(error.lines()[0])
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read ({one_line(error)})")
    return empty


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a record; None for anything else."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def _whole(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if type(value) is int and 0 <= value < 2**63 else None


def _add_last_step(status: RunStatus, last: Mapping[str, Any]) -> None:
    names = {"all": "loss", "text": "loss_text", "image": "loss_image"}
    status.loss = {name: _number(last, key) for name, key in names.items()}
    for key in ("tokens_per_second", "mfu", "learning_rate", "grad_norm"):
        setattr(status, key, _number(last, key))
    status.consumed_tokens = _whole(last, "consumed_tokens")
    status.trained_tokens = _whole(last, "trained_tokens")


def _add_holder(status: RunStatus, holder: Holder, events: Sequence[Event]) -> None:
    values = holder.values
    host, job, since = (values.get(key) for key in ("host", "slurm_job", "since"))
    status.host = str(host)[:200] if host else None
    status.slurm_job = str(job)[:80] if job else None
    status.since = str(since)[:80] if since else None
    status.pid = _whole(values, "pid")
    status.sign_of_life_seconds = holder.sign_seconds
    last = events[-1] if events else None
    if last is not None:
        status.last_event = dict(last.values)
        if not status.host:
            status.host = last.host or None
    status.state = _state(status, holder, last.kind if last else None)


def _state(status: RunStatus, holder: Holder, last_event: str | None) -> str:
    if holder.is_alive:
        return "running"
    if last_event in STATES:
        return STATES[last_event]
    if status.step is not None and status.step == status.steps and last_event is None:
        return "finished"  # of an earlier version, which noted no end
    if last_event is not None:
        return "died" if holder.is_alive is False else "silent"
    if status.step is None:
        return "new"
    return "ended" if holder.is_alive is False else "unknown"


def _add_times(status: RunStatus, run: Path, seconds: Sequence[float]) -> None:
    if status.step is not None:
        with suppress(OSError):
            age = time.time() - (run / METRICS_FILE).stat().st_mtime
            status.last_step_seconds = max(0.0, age)
    if status.state != "running":
        return
    if status.steps and status.step is not None and seconds:
        status.eta_seconds = max(0, status.steps - status.step) * statistics.fmean(seconds)
    usual, since = status.median_step_seconds, status.last_step_seconds
    if usual is not None and since is not None:
        status.is_stalled = since > max(STALL_FACTOR * usual, STALL_SECONDS)


class _HeldOut:
    """The held-out losses of a file that grows: only what is new is read."""

    def __init__(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._end = 0
        self._values: dict[int, dict[str, Any]] = {}

    def read(self, path: Path) -> None:
        try:
            file = open_to_read(path)
        except ChameleonError:
            return
        with file, suppress(OSError):
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self._identity or found.st_size < self._end:
                # A resumed run writes the file again.
                self._identity, self._end, self._values = (found.st_dev, found.st_ino), 0, {}
            file.seek(self._end)
            while line := file.readline(LONGEST_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE_BYTES:
                    return  # it is being written
                self._end += len(line)
                if b'"validation/loss"' in line and isinstance(record := parse_object(line), dict):
                    self._values[record["step"]] = record

    def summary(self) -> dict[str, float | int | None]:
        """The last losses, and the lowest one with its step; empty without any."""
        losses = {s: v for s, r in self._values.items() if (v := _number(r, HELD_OUT)) is not None}
        if not losses:
            return {}
        last, lowest = max(losses), min(losses, key=lambda step: (losses[step], step))
        record = self._values[last]
        return {
            "step": last,
            "all": losses[last],
            "text": _number(record, f"{HELD_OUT}_text"),
            "image": _number(record, f"{HELD_OUT}_image"),
            "lowest": losses[lowest],
            "lowest_step": lowest,
        }


def _add_checkpoints(status: RunStatus, run: Path) -> None:
    try:
        found: list[RunCheckpoint] = list_checkpoints(run, status.problems)
    except (OSError, ValueError) as error:
        status.problems.append(f"checkpoints cannot be read ({one_line(error)})")
        return
    whole = [checkpoint for checkpoint in found if checkpoint.is_whole]
    status.checkpoints = len(whole)
    if not found:
        return
    newest = found[-1]
    saved = newest.saved
    age = None if saved is None else max(0.0, time.time() - saved.timestamp())
    status.checkpoint = {
        "step": newest.step,
        "path": str(newest.path),
        "is_whole": newest.is_whole,
        "age_seconds": age,
    }
    if not newest.is_whole:
        status.problems.append(f"{newest.path} is not whole: it has no state.json")


def _add_alarms(status: RunStatus, run: Path, events: Sequence[Event]) -> None:
    kept = _read(lambda: read_alarms(run), None, ALARMS_FILE, status.problems)
    status.alarms = len(kept.alarms) + kept.left_out if kept else 0
    if status.alarms:
        texts = [event.text for event in events if event.kind == "alarm"]
        steps = [alarm["step"] for alarm in kept.alarms] if kept else []
        status.last_alarm = texts[-1] if texts else f"step {steps[-1]}" if steps else None


def _add_starts(status: RunStatus, run: Path, events: Sequence[Event]) -> None:
    """How often the run was started; an earlier version left only its commands."""
    starts = [event for event in events if event.kind in STARTS]
    if starts:
        earlier = starts[-1].values.get("earlier_starts")
        status.starts = max(len(starts), earlier + 1 if type(earlier) is int else 1)
        return
    with suppress(ChameleonError, OSError):
        status.starts = len(read_commands(run)) or None
