"""The small files of a run folder: config, environment, commands, events and alarms."""

import dataclasses
import datetime
import functools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from megatron_chameleon.config.reading.interpolation import unresolved
from megatron_chameleon.config.reading.yaml_file import read_yaml
from megatron_chameleon.config.schema import Config
from megatron_chameleon.files import read_bytes, read_json_object
from megatron_chameleon.runs.lines import LARGEST_STEP, BrokenLines, read_objects

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
COMMAND_FILE = "command.txt"
EVENTS_FILE = "events.jsonl"
ALARMS_FILE = "alarms.jsonl"
STARTS = ("start", "restart")
"""Events with which a process begins."""
MOST_EVENTS = 10_000
"""Events or alarms that are kept; of more, the newest."""
_LONGEST_TEXT = 2000
_INDEX = re.compile(r"\[\d+\]")
_COMMAND_BYTES = 4 << 20


@dataclass(frozen=True)
class Event:
    """A line of ``events.jsonl``: something that happened to a run."""

    time: datetime.datetime | None
    """With its time zone; None if the line does not say when."""
    kind: str
    """Such as start, restart, alarm, stop, finish, rollback or validation_rises."""
    step: int | None
    host: str
    text: str
    values: Mapping[str, Any]
    """The whole object, with keys that this version does not know."""


@dataclass(frozen=True)
class RecordedEvents:
    """The events of a run, oldest first."""

    events: list[Event]
    left_out: int
    """How many older ones there are than ``MOST_EVENTS``."""
    broken: BrokenLines


@dataclass(frozen=True)
class RecordedAlarms:
    """The divergence alarms of a run as they were written, each with its ``step``."""

    alarms: list[dict[str, Any]]
    left_out: int
    broken: BrokenLines


@dataclass(frozen=True)
class RecordedConfig:
    """The config of a run as ``section.key`` and value, keys of other versions included."""

    values: dict[str, Any]
    text: str
    """The file."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; that of this version's defaults where the file lacks it."""
        return self.values.get(key, defaults().get(key, default))

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The default and the run's value of each key that is not at its default.

        A key that this version does not know has the default None.
        """
        found = {}
        for key, value in self.values.items():
            is_known, usual = default_of(key)
            if not is_known or usual != value:
                found[key] = (usual, value)
        return found


@functools.cache
def defaults() -> dict[str, Any]:
    """The defaults of this version as ``section.key`` and value."""
    return dict(flatten(dataclasses.asdict(Config())))


def default_of(key: str) -> tuple[bool, Any]:
    """Whether this version knows a key, and its default.

    An entry of a list has the defaults of its class: ``data.stage1[3].weight`` is usually 1.0.
    """
    if key in defaults():
        return True, defaults()[key]
    return _entry_defaults().get(_INDEX.sub("[]", key), (False, None))


@functools.cache
def _entry_defaults() -> dict[str, tuple[bool, Any]]:
    """``data.stage1[].weight`` and the like, with their defaults."""
    return dict(_defaults_of_lists(Config, ""))


def _defaults_of_lists(cls: type, key: str) -> Iterator[tuple[str, tuple[bool, Any]]]:
    for name, hint in get_type_hints(cls).items():
        place = f"{key}.{name}" if key else name
        (entry, *_) = (*get_args(hint), None)
        if dataclasses.is_dataclass(hint):
            yield from _defaults_of_lists(cast(type, hint), place)
        elif get_origin(hint) is list and dataclasses.is_dataclass(entry):
            usual = dataclasses.asdict(cast(type, entry)())
            yield from ((f"{place}[].{inner}", (True, v)) for inner, v in flatten(usual))


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists: ``data.stage1[0].prefix`` and its value.

    An empty list is a leaf.
    """
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from flatten(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield from flatten(entry, f"{key}[{index}]")
    else:
        yield key, value


def read_recorded_config(run: Path) -> RecordedConfig:
    """The config of a run. ``${...}`` is not replaced, and unknown keys are kept.

    Raises:
        ChameleonError: There is none, or it is not plain YAML.
    """
    file = run / CONFIG_FILE
    values = dict(flatten(unresolved(read_yaml(file))))
    return RecordedConfig(values, read_bytes(file).decode("utf-8", "replace"))


def read_environment(run: Path) -> dict[str, Any]:
    """What ``environment.json`` says.

    Raises:
        ChameleonError: There is none, or it is not a JSON object.
    """
    return read_json_object(run / ENVIRONMENT_FILE)


def read_commands(run: Path) -> list[str]:
    """The command of each start of a run, oldest first.

    Raises:
        ChameleonError: There is no ``command.txt``, or it cannot be read.
    """
    content = read_bytes(run / COMMAND_FILE, limit=_COMMAND_BYTES)
    return [line for line in content.decode("utf-8", "replace").splitlines() if line.strip()]


def read_events(run: Path) -> RecordedEvents:
    """The events of a run; none if an earlier version wrote it.

    Raises:
        ChameleonError: The file cannot be read.
    """
    records, left_out, broken = _read_newest(run / EVENTS_FILE, has_step=False)
    return RecordedEvents([_event(record) for record in records], left_out, broken)


def read_alarms(run: Path) -> RecordedAlarms:
    """The divergence alarms of a run; none if it has no such file.

    Raises:
        ChameleonError: The file cannot be read.
    """
    return RecordedAlarms(*_read_newest(run / ALARMS_FILE, has_step=True))


def _read_newest(file: Path, has_step: bool) -> tuple[list[dict[str, Any]], int, BrokenLines]:
    broken = BrokenLines(file)
    newest: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
    count = 0
    if file.exists():
        for record in read_objects(file, broken, has_step=has_step):
            newest.append(record)
            count += 1
    return list(newest), count - len(newest), broken


def _event(record: dict[str, Any]) -> Event:
    step = record.get("step")
    return Event(
        time=_time(record.get("time")),
        kind=_text(record.get("event")),
        step=step if type(step) is int and 0 <= step <= LARGEST_STEP else None,
        host=_text(record.get("host")),
        text=_text(record.get("text")),
        values=record,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:_LONGEST_TEXT]


def _time(value: Any) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(value)
        aware = found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
        return aware.astimezone(datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        return None
