"""A run's line of descent: the checkpoints that led to its newest one. Every reader asks here.

A run that goes back to an older checkpoint begins a new branch. The checkpoints of the abandoned
branch move to a folder ``branch_0001`` beside those that stay, so that in ``checkpoints/`` the
order of the steps is the order of descent:

    step_00000004  step_00000006        the current line
    branch_0001/step_00000008 ...       the branch that was abandoned, with its metrics and samples
    line.json                           what the run last began from, and moves that are not done

``line.json`` is written before anything moves, so a run that is killed while it goes back finishes
that at its next start, whichever command starts it. It also tells a restart of the command that
went back from a wish to go back once more: see ``resume.py``. All names in it are relative, so a
run may be moved. Without the file, a run has never gone back.

Earlier versions left an abandoned branch where it was. Its checkpoints are recognised by two signs
together, since a copy may change the times of files: a checkpoint of a lower step was written
later, and ``metrics.jsonl`` ends before the step.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    STEP_FOLDER,
    list_step_folders,
    step_of,
)
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import read_json_object, why_no_folder, write_text

LINE_FILE = "line.json"
LINE_FORMAT = "megatron_chameleon.line/1"
BRANCH_FOLDER = re.compile(r"branch_\d{4,}")
BRANCH_FILE = "branch.json"
METRICS_FILE = "metrics.jsonl"
_TAIL_BYTES = 1 << 20
"""How much of ``metrics.jsonl`` is searched from its end for the last whole line."""


@dataclass(frozen=True)
class Moves:
    """Renames that take a run from one branch to another, as names in ``checkpoints/``."""

    branch: str
    """The folder for what is set aside."""
    after_step: int
    """The last step that both branches share."""
    renames: tuple[tuple[str, str], ...]
    """Old and new name of each checkpoint, in the order in which they are renamed."""
    records_from: str | None
    """The branch that the run returns to, whose metrics and samples it takes; None: its own."""
    keeps_records: bool
    """Whether ``metrics.jsonl`` and its like belong to the branch that is set aside."""
    step: int
    """The step that the run goes on from."""


@dataclass(frozen=True)
class LineRecord:
    """The content of ``line.json``."""

    given: str | None = None
    """What the latest start was told to begin from: ``never``, a name in ``checkpoints/``, or the
    absolute path of a checkpoint elsewhere. A start with ``auto`` leaves it as it is."""
    since: str | None = None
    """When that was, as local time."""
    pending: Moves | None = None
    """Moves that may not be finished."""


def read_line(folder: Path) -> LineRecord:
    """What ``line.json`` of a ``checkpoints/`` folder says; empty if there is none.

    Raises:
        CheckpointError: It cannot be read.
    """
    file = folder / LINE_FILE
    if not file.exists():
        return LineRecord()
    remedy = "Remove it; the run then goes on from its newest checkpoint"
    try:
        record = read_json_object(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(error.where, error.what, remedy) from error
    try:
        if record["format"] != LINE_FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        pending = record["pending"] and _read_moves(record["pending"])
        given, since = record["given"], record["since"]
        if not all(value is None or isinstance(value, str) for value in (given, since)):
            raise TypeError("given and since must be text")
    except (KeyError, TypeError, ValueError) as error:
        what = f"does not say where the run stands ({type(error).__name__}: {error})"
        raise CheckpointError(str(file), what, remedy) from error
    return LineRecord(given, since, pending)


def write_line(folder: Path, record: LineRecord) -> None:
    """Write ``line.json``.

    Raises:
        CheckpointError: The file system refuses it.
    """
    values = {"format": LINE_FORMAT, **asdict(record)}
    write_text(folder / LINE_FILE, json.dumps(values, indent=1) + "\n", CheckpointError)


def _read_moves(record: dict[str, Any]) -> Moves:
    renames = tuple((str(old), str(new)) for old, new in record["renames"])
    moves = Moves(**{**record, "renames": renames})
    names = [moves.branch, *([moves.records_from] if moves.records_from else [])]
    is_known = all(BRANCH_FOLDER.fullmatch(name) for name in names)
    if type(moves.after_step) is not int or type(moves.step) is not int:
        raise TypeError("a step in it is not a number")
    if not is_known or not all(place_of(name) for pair in renames for name in pair):
        raise ValueError("a name in it is not one of a checkpoint")
    return moves


def place_of(name: str) -> str | None:
    """The name if it is one of a run's checkpoint, such as ``branch_0001/step_00000004``."""
    *branch, step = name.split("/")
    is_branch = len(branch) <= 1 and all(BRANCH_FOLDER.fullmatch(part) for part in branch)
    return name if is_branch and STEP_FOLDER.fullmatch(step) else None


def find_place(folder: Path, path: Path) -> str | None:
    """The name of a checkpoint within a ``checkpoints/`` folder; None if it lies elsewhere.

    Args:
        folder: The run's.
        path: As the user gave it: it may be a link, lead through links, or be gone already.
    """
    top = folder.resolve()
    for found in (path.parent.resolve() / path.name, path.resolve()):
        if found.is_relative_to(top) and (place := place_of(found.relative_to(top).as_posix())):
            return place
    return None


def list_line(folder: Path, *, whole: bool = True) -> list[Path]:
    """The checkpoints of a run's current line, oldest first.

    Args:
        folder: The run's ``checkpoints/`` folder.
        whole: Leave out those without ``state.json``.

    Raises:
        CheckpointError: ``line.json`` cannot be read.
    """
    strays = set(list_strays(folder))
    found = (path for path in list_step_folders(folder) if path not in strays)
    return [path for path in found if not whole or (path / STATE_FILE).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint that a path means: a ``step_...`` folder, or the newest one of a run.

    Args:
        path: A checkpoint folder, a ``checkpoints`` folder or a run folder.

    Raises:
        CheckpointError: There is no whole checkpoint; the message says what was found.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(str(path), why_no_folder(path), "Give a checkpoint or a run folder")
    if (path / STATE_FILE).is_file():
        return path
    if (path / ".metadata").exists() or STEP_FOLDER.fullmatch(path.name):
        raise CheckpointError(
            str(path),
            f"the checkpoint is not whole: it has no {STATE_FILE}, which is written last",
            "Use an earlier step, or let the run save again",
        )
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    whole = list_line(parent)
    if not whole:
        broken = sum(1 for folder in parent.iterdir() if STEP_FOLDER.fullmatch(folder.name))
        raise CheckpointError(
            str(path),
            f"no whole checkpoint in {parent} ({broken} step folders without {STATE_FILE})",
            "Train until the first save, or give another run's folder",
        )
    return whole[-1]


def list_strays(folder: Path) -> list[Path]:
    """Checkpoints that lie among those of the current line but belong to an abandoned branch.

    There are some only until the next start sets them aside: see the top of this file.
    """
    pending = read_line(folder).pending
    leaving = {old for old, new in pending.renames if "/" in new} if pending else set()
    staying = [path for path in list_step_folders(folder) if path.name not in leaving]
    return [folder / name for name in sorted(leaving) if (folder / name).is_dir()] + (
        _list_left_by_earlier_version(folder, staying)
    )


def _list_left_by_earlier_version(folder: Path, checkpoints: Sequence[Path]) -> list[Path]:
    times = {path: _time_written(path) for path in checkpoints}
    outdated = [
        path
        for number, path in enumerate(checkpoints)
        if any(times[older] > times[path] > 0 for older in checkpoints[:number])
    ]
    last_step = last_metrics_step(folder.parent) if outdated else None
    return [path for path in outdated if last_step is not None and step_of(path) > last_step]


def _time_written(checkpoint: Path) -> int:
    try:
        return (checkpoint / STATE_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def last_metrics_step(run: Path) -> int | None:
    """The step of the last whole line of a run's ``metrics.jsonl``; None if there is none."""
    try:
        with (run / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def list_branches(folder: Path) -> list[Path]:
    """The folders of the branches that were set aside, in the order in which that was done."""
    found = folder.iterdir() if folder.is_dir() else ()
    branches = [path for path in found if BRANCH_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(branches, key=_number_of)


def next_branch(folder: Path) -> str:
    """The name for the next branch that is set aside; a name is never used twice."""
    return f"branch_{max(map(_number_of, list_branches(folder)), default=0) + 1:04d}"


def shared_steps(folder: Path, branch: str) -> int:
    """The last step that an abandoned branch shares with the current line.

    Args:
        folder: The run's ``checkpoints/`` folder.
        branch: The name of its folder.

    Raises:
        CheckpointError: A branch does not say where it began.
    """
    since = [path for path in list_branches(folder) if _number_of(path) >= int(branch[7:])]
    return min(map(_read_fork, since), default=0)


def _read_fork(branch: Path) -> int:
    """The step at which a branch began; 0, with which nothing goes wrong, if nobody knows it."""
    if not (branch / BRANCH_FILE).exists():
        return 0
    step = read_json_object(branch / BRANCH_FILE, CheckpointError).get("after_step")
    if type(step) is not int or step < 0:
        what = f"after_step is {step!r}, which is not a step"
        raise CheckpointError(str(branch / BRANCH_FILE), what, "Write the step where it began")
    return step


def _number_of(branch: Path) -> int:
    return int(branch.name.removeprefix("branch_"))
