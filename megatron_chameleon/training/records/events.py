"""The run's event log: ``events.jsonl`` has a line for all that happens to a run besides its steps.

    {"time": "2026-11-28T21:40:07.123+00:00", "event": "save", "step": 1000, "host": "node1",
     "text": "saved runs/x/checkpoints/step_00001000"}

Rank 0 writes it. Only the report of a hang may come from another rank, because rank 0 may be the
one that hangs. A line is appended when the event is over, so a run that was killed has no line for
its end, which the next start says. What goes to a command or a webhook is sent by ``notify.py``.
"""

import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ChameleonError, one_line
from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.runs.records import COMMAND_FILE, EVENTS_FILE, STARTS
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.training.records.growing_file import (
    GrowingFile,
    cut_broken_end,
    read_json_lines,
)
from megatron_chameleon.training.records.notify import WAIT_SECONDS, Notifier

logger = logging.getLogger(__name__)


ENDS = ("stop", "finish", "error", "hang")
"""Events after which the process ends."""
LONGEST_TEXT = 4000
INTERRUPTED_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Past:
    """What ``events.jsonl`` says of the time before this process.

    Attributes:
        starts: How often the run was started.
        last: The last event; None if there is none.
        last_start: The last start; None if there is none.
    """

    starts: int = 0
    last: Mapping[str, Any] | None = None
    last_start: Mapping[str, Any] | None = None


class EventLog:
    """Takes the events of a run while it is entered. Every rank has one; rank 0 writes.

    Leaving it with an exception records how the run ended, and waits a few seconds for what is
    still being sent. A file that cannot be written is one warning; it never ends a run.

    Args:
        config: ``logging.run_dir`` and ``logging.on_event`` are read.
        rank: Of this process.

    Attributes:
        step: The step that an event belongs to if it names none; the loop's last one.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._folder = Path(config.logging.run_dir)
        self._config = config
        self._is_writer = rank == 0
        self._has_warned = False
        self._notifier = Notifier(config.logging, self._folder) if self._is_writer else None
        self.step = 0

    def __enter__(self) -> "EventLog":
        if self._is_writer:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                cut_broken_end(self._folder / EVENTS_FILE)
            except (ChameleonError, OSError) as error:
                self._warn(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_writer:
            return
        # What ends the run is said already; a disk that is full is not said twice.
        self._has_warned |= error is not None
        is_interrupted = isinstance(error, KeyboardInterrupt)
        if is_interrupted:
            text = f"interrupted after step {self.step}; steps since the last checkpoint are lost"
            self.record("stop", text, signal="SIGINT")
        elif isinstance(error, Exception):
            self.record("error", one_line(error), kind=type(error).__name__)
        if self._notifier is not None:
            # After Ctrl-C, cli/interrupts.py ends the process soon.
            self._notifier.close(INTERRUPTED_WAIT_SECONDS if is_interrupted else WAIT_SECONDS)

    def start(self, steps_done: int) -> None:
        """Record that the run starts after so many steps: the first time, or once more."""
        self.step = steps_done
        if not self._is_writer:
            return
        past = read_past(self._folder)
        where = f"on {platform.node()}"
        job = os.environ.get("SLURM_JOB_ID")
        if job:
            where += f" as SLURM job {job}"
        if not past.starts:
            self.record("start", f"started {where}, at step {steps_done}", slurm_job=job)
            return
        text = f"start {past.starts + 1} {where}, at step {steps_done}"
        if words := _describe_silent_end(past):
            text += f"; {words}"
        self.record("restart", text, earlier_starts=past.starts, slurm_job=job)

    def record(self, event: str, text: str, step: int | None = None, **values: Any) -> None:
        """Append an event, and send it to whoever wants it. It never raises.

        Args:
            event: Such as ``save``.
            text: A line for people. Secrets in it are masked.
            step: None for the last one of the loop.
            values: Further entries of the line; those that are None are left out.
        """
        if self._is_writer:
            self._write(describe_event(event, self.step if step is None else step, text, values))

    def report_hang(self, step: int, text: str) -> None:
        """Record, on any rank, that the run hangs, and wait until it is sent."""
        record = describe_event("hang", step, text, {})
        if self._notifier is None:
            self._notifier = Notifier(self._config.logging, self._folder)
        self._write(record)
        self._notifier.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            with closing(GrowingFile(self._folder / EVENTS_FILE)) as file:
                file.append((json.dumps(record) + "\n").encode())
        except (ChameleonError, OSError, ValueError) as error:
            self._warn(error)
        if self._notifier is not None:
            self._notifier.send(record)

    def _warn(self, error: BaseException) -> None:
        if not self._has_warned:
            logger.warning(f"an event could not be recorded: {one_line(error)}")
        self._has_warned = True


def describe_event(event: str, step: int, text: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The object that stands in ``events.jsonl``."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "step": step,
        "host": platform.node(),
        "text": escape_line(mask_secrets(text[:LONGEST_TEXT])),
        **{key: value for key, value in values.items() if value is not None},
    }


def read_past(folder: Path) -> Past:
    """What is known of the time before; what cannot be read counts as nothing.

    A run of an older version has no events: each start left a line in its ``command.txt``.
    """
    starts, last, last_start = 0, None, None
    path = folder / EVENTS_FILE
    try:
        for record, _ in read_json_lines(path, ("event",)):
            last = record
            if record["event"] in STARTS:
                starts, last_start = starts + 1, record
        if last is None and (folder / METRICS_FILE).exists():
            commands = (folder / COMMAND_FILE).read_bytes().splitlines()
            starts = max(1, len(commands))
    except (ChameleonError, OSError):
        pass
    return Past(starts, last, last_start)


def _describe_silent_end(past: Past) -> str:
    """That the start before left no word of its end; empty if it did."""
    if past.last is None or past.last_start is None or past.last.get("event") in ENDS:
        return ""
    begun = past.last_start
    return (
        f"the one before, on {begun.get('host')} since {begun.get('time')}, ended without a word "
        f"after its last event ({past.last.get('event')} at step {past.last.get('step')})"
    )
