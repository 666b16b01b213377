"""One run, as its folder shows it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.runs.checkpoints import (
    FOLDER,
    RunBranch,
    RunCheckpoint,
    list_checkpoints,
    list_run_branches,
)
from megatron_chameleon.runs.lines import BrokenLines
from megatron_chameleon.runs.metrics import Metrics, read_metrics
from megatron_chameleon.runs.records import (
    ALARMS_FILE,
    COMMAND_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
    RecordedAlarms,
    RecordedConfig,
    RecordedEvents,
    read_alarms,
    read_commands,
    read_environment,
    read_events,
    read_recorded_config,
)

T = TypeVar("T")
_SIGNS = (METRICS_FILE, CONFIG_FILE, ENVIRONMENT_FILE, COMMAND_FILE, FOLDER)
"""A folder with one of these is a run's."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; whatever is missing is empty."""

    path: Path
    name: str
    """Of the folder."""
    metrics: Metrics
    config: RecordedConfig
    environment: dict[str, Any]
    commands: list[str]
    """The command of each start, oldest first."""
    events: RecordedEvents
    alarms: RecordedAlarms
    checkpoints: list[RunCheckpoint]
    """Those of the current line, by step."""
    branches: list[RunBranch]
    problems: list[str] = field(default_factory=list)
    """A sentence about each thing that is missing or damaged."""

    @property
    def planned_steps(self) -> int | None:
        """``training.steps``; None if the config does not say."""
        steps = self.config.get("training.steps") if self.config.values else None
        return steps if type(steps) is int and steps > 0 else None

    @property
    def seed(self) -> int | None:
        """``training.seed``; None if the config does not say."""
        seed = self.config.get("training.seed") if self.config.values else None
        return seed if type(seed) is int else None


def find_run(path: str | Path) -> Path:
    """The run folder that a path means: the folder itself, its ``metrics.jsonl``, or what lies in
    its ``checkpoints/``.

    Raises:
        DataError: There is nothing of that name, or it is not a run.
    """
    given = Path(path)
    if not str(path).strip():
        raise DataError("RUN", "the name is empty", "Give a run folder")
    try:
        folder = given.parent if given.is_file() and given.name == METRICS_FILE else given
        if folder.is_file():
            raise DataError(str(given), "is a file, not a run folder", "Give a run folder")
        if not folder.is_dir():
            raise DataError(str(given), "no such run folder", "Check the path")
        place = folder.resolve()
        inside = [place, *place.parents][:3]  # checkpoints/, checkpoints/step, or a branch's step
        above = next((outer.parent for outer in inside if outer.name == FOLDER), None)
        if above is not None and not (folder / METRICS_FILE).exists() and _is_run(above):
            return above
        if _is_run(folder):
            return folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(str(given), f"cannot be read ({reason})", "Check the path") from error
    what = f"is not a run folder: it has none of {', '.join(_SIGNS)}"
    raise DataError(str(given), what, "Give the folder of logging.run_dir")


def run_files(folder: Path) -> list[Path]:
    """The files of a run that a report must not replace."""
    names = (METRICS_FILE, CONFIG_FILE, ENVIRONMENT_FILE, COMMAND_FILE, EVENTS_FILE, ALARMS_FILE)
    return [folder / name for name in names]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _SIGNS)


def read_run(path: str | Path, wants: Callable[[str], bool] = lambda key: True) -> RunRecord:
    """Read a run folder.

    Args:
        path: As for ``find_run``.
        wants: Which metrics to keep; a selection saves memory.

    Raises:
        DataError: It is not a run.
    """
    folder = find_run(path)
    problems: list[str] = []

    def read(name: str, reader: Callable[[Path], T], empty: T) -> T:
        """What a file holds. One that an earlier version did not write yet may be missing."""
        try:
            return reader(folder)
        except ChameleonError as error:
            is_missing = name not in (EVENTS_FILE, ALARMS_FILE) and not (folder / name).exists()
            problems.append(f"{name} is missing" if is_missing else error.lines()[0])
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
        return empty

    metrics = Metrics(BrokenLines(folder / METRICS_FILE))
    metrics = read(METRICS_FILE, lambda run: read_metrics(run / METRICS_FILE, wants), metrics)
    config = read(CONFIG_FILE, read_recorded_config, RecordedConfig({}, ""))
    environment: dict[str, Any] = read(ENVIRONMENT_FILE, read_environment, {})
    commands: list[str] = read(COMMAND_FILE, read_commands, [])
    events = read(
        EVENTS_FILE, read_events, RecordedEvents([], 0, BrokenLines(folder / EVENTS_FILE))
    )
    alarms = read(
        ALARMS_FILE, read_alarms, RecordedAlarms([], 0, BrokenLines(folder / ALARMS_FILE))
    )
    logs = (metrics.broken, events.broken, alarms.broken)
    problems += [str(broken) for broken in logs if broken.count]
    return RunRecord(
        path=folder,
        name=folder.resolve().name,
        metrics=metrics,
        config=config,
        environment=environment,
        commands=commands,
        events=events,
        alarms=alarms,
        checkpoints=list_checkpoints(folder, problems),
        branches=list_run_branches(folder, problems),
        problems=problems,
    )
