"""Set an abandoned branch of a run aside, or bring one back, so that a kill anywhere is harmless.

``checkpoint/state/line.py`` says what a branch is. What belongs to one moves or is copied in this
order:

1. The branch's folder gets copies of the run's records: metrics, alarms, samples and the like.
2. ``line.json`` notes the renames that are to come.
3. The checkpoints are renamed, and the records of the branch that goes on take their place.
4. ``line.json`` notes that this is done.

A run that is killed in between finishes from step 2 on at its next start. Nothing is deleted before
its copy is complete. Only rank 0 calls these functions, while the run is locked.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import (
    STEP_FOLDER,
    flush_to_disk,
    step_of,
)
from megatron_chameleon.checkpoint.state.line import (
    BRANCH_FILE,
    METRICS_FILE,
    LineRecord,
    Moves,
    read_line,
    write_line,
)
from megatron_chameleon.checkpoint.state.start import Start
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import empty_folder, own_folder, write_bytes, write_text, writing
from megatron_chameleon.runs.answers.modalities import FOLDER as MODALITIES
from megatron_chameleon.runs.answers.samples import FOLDER as SAMPLES
from megatron_chameleon.runs.records import ALARMS_FILE, CONFIG_FILE, EVENTS_FILE
from megatron_chameleon.training.run.skipped_steps import NONFINITE_FILE
from megatron_chameleon.training.run.trackers import WANDB_ID_FILE

_ELSEWHERE = "give another logging.run_dir"
RECORDS = (
    METRICS_FILE,
    ALARMS_FILE,
    NONFINITE_FILE,
    EVENTS_FILE,
    WANDB_ID_FILE,
    "tensorboard",
    SAMPLES,
    MODALITIES,
)
"""What a run writes about its steps. A branch keeps a copy of each."""


def carry_out(folder: Path, start: Start) -> None:
    """Note what a run begins from, and make its folder look as ``find_start`` planned.

    Args:
        folder: The run's ``checkpoints/`` folder.
        start: What was planned since the last ``finish_moves``.

    Raises:
        CheckpointError: The file system refuses it. What was begun is finished by the next start.
    """
    record = read_line(folder)
    if start.given is not None and start.given != record.given:
        record = LineRecord(start.given, time.strftime("%Y-%m-%d %H:%M:%S"))
    if start.moves is not None:
        _make_branch(folder, start.moves)
        record = replace(record, pending=start.moves)
    if record != read_line(folder):
        write_line(folder, record)
    finish_moves(folder)


def finish_moves(folder: Path) -> None:
    """Do what ``line.json`` says is to be done; nothing if it is done.

    Raises:
        CheckpointError: The file system refuses it.
    """
    record = read_line(folder)
    moves = record.pending
    if moves is None:
        return
    with writing(folder, CheckpointError):
        for old, new in moves.renames:
            _rename(folder / old, folder / new)
        if moves.records_from is not None:
            _restore_records(folder / moves.records_from, folder.parent)
        elif moves.keeps_records:
            # Weights & Biases takes each step once, so the new branch is a new run there.
            (folder.parent / WANDB_ID_FILE).unlink(missing_ok=True)
        if moves.keeps_records:
            _drop_later_records(folder.parent, moves.step)
        flush_to_disk(folder)
    write_line(folder, replace(record, pending=None))


def _make_branch(folder: Path, moves: Moves) -> None:
    """Create the branch's folder, with the records of the run as they are now."""
    partial = own_folder(folder / f".{moves.branch}.partial", CheckpointError, _ELSEWHERE)
    with ExitStack() as stack, writing(partial, CheckpointError):
        empty_folder(partial)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        if moves.keeps_records:
            for name in (*RECORDS, CONFIG_FILE):
                _copy(folder.parent / name, partial / name)
        values = {"after_step": moves.after_step, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(partial / BRANCH_FILE, json.dumps(values) + "\n", CheckpointError)
        partial.rename(folder / moves.branch)
        flush_to_disk(folder)


def _rename(old: Path, new: Path) -> None:
    """Rename a checkpoint, unless that was done before. A link keeps its target.

    When it was done, another checkpoint may have taken the old name since.
    """
    if os.path.lexists(new) or not os.path.lexists(old):
        return
    if old.is_symlink() and not old.readlink().is_absolute():
        target = os.path.relpath(old.parent.resolve() / old.readlink(), new.parent.resolve())
        new.symlink_to(target)
        old.unlink()
    else:
        old.rename(new)


def _restore_records(branch: Path, run: Path) -> None:
    """Put a branch's records in place of the run's. The branch keeps its own."""
    if not (branch / METRICS_FILE).exists():
        return  # an earlier version left only the checkpoints
    for name in RECORDS:
        place = run / name
        if (branch / name).is_dir():
            partial = own_folder(run / f".{name}.partial", CheckpointError, _ELSEWHERE)
            empty_folder(partial)
            _copy(branch / name, partial)
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
            partial.rename(place)
        elif (branch / name).is_file():
            write_bytes(place, (branch / name).read_bytes(), CheckpointError)
        elif place.is_dir():
            empty_folder(place)
        else:
            place.unlink(missing_ok=True)


def _drop_later_records(run: Path, step: int) -> None:
    """Remove what the run wrote about later steps, which will be done again.

    ``RunFolder`` does so for the metrics at every start.
    """
    for log in (run / NONFINITE_FILE, run / EVENTS_FILE):
        if not log.exists():
            continue
        lines = log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_until(line, step)]
        if len(kept) < len(lines):
            write_bytes(log, b"".join(kept), CheckpointError)
    for name in (SAMPLES, MODALITIES):
        steps = [path for path in (run / name).glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
        for path in steps:
            if step_of(path) > step:
                shutil.rmtree(path)
                # the next sample writes it again
                (run / name / "index.html").unlink(missing_ok=True)


def _is_until(line: bytes, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return line.endswith(b"\n")  # the reader of the file will name a broken line


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder's regular files, to the disk; nothing if it is not there."""
    if source.is_file():
        shutil.copy2(source, target)
        flush_to_disk(target)
    for path in _walk(source) if source.is_dir() else ():
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
        flush_to_disk(place)


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
