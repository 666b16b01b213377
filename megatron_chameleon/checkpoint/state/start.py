"""Choose the checkpoint that a run starts from, and check that its files are sound."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    has_only_weights,
    list_step_folders,
    other_format,
    step_of,
)
from megatron_chameleon.checkpoint.state.integrity import find_damage, find_damage_of_small_files
from megatron_chameleon.checkpoint.state.line import (
    LINE_FILE,
    LineRecord,
    Moves,
    find_place,
    last_metrics_step,
    list_line,
    list_strays,
    next_branch,
    place_of,
    read_line,
    shared_steps,
)
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import why_no_folder
from megatron_chameleon.parallel.collectives import first_message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on, and what its folder then looks like."""

    checkpoint: Path | None = None
    """Where it is now; None for step 0."""
    weights: Path | None = None
    """The folder, of any format, whose weights a run begins with at step 0; None for random weights
    or those of ``checkpoint``."""
    given: str | None = None
    """What to note in ``line.json`` as the beginning; None leaves the note as it is."""
    moves: Moves | None = None
    """What is set aside or brought back first."""
    note: str | None = None
    """What a user should know about the choice, in one line."""

    @property
    def checkpoint_after_moves(self) -> Path | None:
        """Where the checkpoint is once the moves are done."""
        if self.checkpoint is None or self.moves is None or self.moves.records_from is None:
            return self.checkpoint
        return self.checkpoint.parent.parent / self.checkpoint.name


def find_start(folder: Path, resume: str, *, weights_only: bool = False) -> Start:
    """Choose the checkpoint to resume from. Only small files are read, and nothing is changed.

    A job that is requeued repeats its command, which must then go on and not begin again. So
    ``line.json`` notes what the command named. If the note is the same, the run goes on from the
    newest checkpoint of its line; if it differs, somebody wants to go back.

    Args:
        folder: The run's ``checkpoints/`` folder.
        resume: ``auto`` for the newest sound checkpoint of the line, ``never``, or a path. One of
            the run's own checkpoints is where the run goes back to. A path outside the folder is
            where the run begins, as long as it has no checkpoint of its own. It may be a folder of
            weights in Hugging Face's or Meta's format.
        weights_only: Whether the path is a checkpoint of any format, or a run, that only gives the
            run its first weights.

    Raises:
        CheckpointError: The path is not a sound checkpoint, none of the line's checkpoints is
            sound, or ``never`` would continue a run that began otherwise.
    """
    found, record = list_line(folder), read_line(folder)
    if resume == "auto":
        return _go_on(folder)
    if resume == "never":
        if not found or record.given == "never":
            return _go_on(folder, given="never")
        what = f"the run folder already holds a run up to {found[-1].name}"
        raise CheckpointError(
            str(folder), what, "Use --resume auto or another logging.run_dir, or remove the run"
        )
    place = find_place(folder, Path(resume))
    given = place or str(Path(resume).absolute())
    if found and given == record.given:
        return _go_on(folder, note=lambda newest: _note_repeated(folder, resume, record, newest))
    if weights_only and place:
        what = "it is one of the run's own checkpoints, and only another run can begin with them"
        remedy = f"Use --resume {resume} to go back to it, or give another logging.run_dir"
        raise CheckpointError(resume, what, remedy)
    checkpoint = folder / place if place else Path(resume)
    is_weights = weights_only or (place is None and has_only_weights(checkpoint))
    if not is_weights:
        _check_given(checkpoint, Path(resume))
    elif not checkpoint.is_dir():
        raise _not_a_checkpoint(checkpoint)
    if place is None and Path(resume).resolve().is_relative_to(folder.resolve()):
        what = "it lies among the run's checkpoints, but its name is not that of one"
        remedy = f"Give a folder such as {folder}/step_... or {folder}/branch_0001/step_..."
        raise CheckpointError(resume, what, remedy)
    if place is None and found:
        own = "the run has checkpoints of its own and goes on from"
        return _go_on(folder, note=lambda newest: f"{own} {newest.name}; {resume} is not read")
    if is_weights:
        return Start(weights=checkpoint.absolute(), given=given)
    moves = None if place is None else _moves_to(folder, place)
    note = _note_moves(folder, moves, f"the run goes back to {place}") if moves else None
    return Start(checkpoint, given=given, moves=moves, note=note)


def _go_on(
    folder: Path, given: str | None = None, note: Callable[[Path], str] | None = None
) -> Start:
    """Go on from the newest checkpoint of the line, or begin."""
    damages = []
    for checkpoint in reversed(list_line(folder, whole=False)):
        damage = find_damage_of_small_files(checkpoint)
        if damage is None:
            start = Start(checkpoint, given=given, note=note and note(checkpoint))
            return _tidied(folder, start)
        damages.append(damage)
    if damages:
        raise _none_is_sound(folder, damages)
    return Start(given=given)


def _tidied(folder: Path, start: Start) -> Start:
    """The start, with what an earlier version left of an abandoned branch set aside."""
    strays = [] if read_line(folder).pending else list_strays(folder)
    if not strays:
        return start
    first = step_of(strays[0])
    shared = [step_of(path) for path in list_line(folder) if step_of(path) < first]
    moves = _moves_out(folder, strays, max(shared, default=0), keeps_records=False)
    why = f"the run goes on from {start.checkpoint and start.checkpoint.name}, written last"
    return replace(start, moves=moves, note=_note_moves(folder, moves, why))


def _moves_to(folder: Path, place: str) -> Moves | None:
    """What must move so that one of a run's checkpoints is the newest of its line; or None."""
    step = step_of(Path(place))
    if "/" not in place:
        later = [path for path in list_step_folders(folder) if step_of(path) > step]
        if not later and (last_metrics_step(folder.parent) or 0) <= step:
            return None
        return _moves_out(folder, later, step, keeps_records=True)
    branch = folder / Path(place).parent
    shared = shared_steps(folder, branch.name)
    later = [path for path in list_step_folders(folder) if step_of(path) > shared]
    out = _moves_out(folder, later, shared, keeps_records=True)
    back = tuple(
        (f"{branch.name}/{path.name}", path.name)
        for path in list_step_folders(branch)
        if step_of(path) <= step
    )
    return replace(out, renames=out.renames + back, records_from=branch.name, step=step)


def _moves_out(
    folder: Path, checkpoints: Sequence[Path], after_step: int, *, keeps_records: bool
) -> Moves:
    branch = next_branch(folder)
    # The newest first: one that is still there never seems to be the end of the new line.
    renames = tuple((path.name, f"{branch}/{path.name}") for path in reversed(checkpoints))
    return Moves(branch, after_step, renames, None, keeps_records, after_step)


def _note_moves(folder: Path, moves: Moves, why: str) -> str:
    leaving = [old for old, new in moves.renames if "/" in new]
    things = leaving
    if len(leaving) > 1:
        things = [f"{len(leaving)} checkpoints ({leaving[-1]} to {leaving[0]})"]
    if moves.keeps_records:
        things.append(f"the metrics after step {moves.after_step}")
    place = folder / moves.branch
    back = f"; --resume {place / leaving[0]} returns to them" if leaving else ""
    return f"{why}: {' and '.join(things)} are set aside in {place}{back}"


def _note_repeated(folder: Path, resume: str, record: LineRecord, newest: Path) -> str:
    text = (
        f"the run began from {resume} on {record.since} and goes on from its newest checkpoint, "
        f"{newest.name}"
    )
    if record.given and place_of(record.given) and (folder / record.given).is_dir():
        text += (
            f"; to go back to {record.given} once more, remove {folder / LINE_FILE} and run the "
            "same command"
        )
    return text


def _check_given(checkpoint: Path, given: Path) -> None:
    if not (checkpoint / STATE_FILE).is_file():
        raise _not_a_checkpoint(given)
    damage = find_damage_of_small_files(checkpoint)
    if damage:
        raise CheckpointError(str(given), damage, "Use an older checkpoint")


def _not_a_checkpoint(path: Path) -> CheckpointError:
    what = f"This is not a whole checkpoint: it has no {STATE_FILE}"
    remedy = "Give a folder such as runs/NAME/checkpoints/step_..."
    if not path.is_dir():
        what = why_no_folder(path)
    elif (path / "checkpoints").is_dir():
        what = "This is a run folder, not one of its checkpoints"
        remedy = (
            f"Give a folder such as {path}/checkpoints/step_..., or use --start-from {path} to "
        )
        remedy += "begin with the weights of its newest checkpoint"
    elif format_name := other_format(path):
        what = f"This is a {format_name} folder"
        remedy = f"--start-from {path} begins a run with its weights. To keep the optimizer state, "
        remedy += f"run `chameleon convert {path} DST --to megatron` first and resume from DST"
    return CheckpointError(str(path), what, remedy)


def find_sound(folder: Path, start: Start) -> Start:
    """Check all files of the chosen checkpoint, and fall back to an older one if some are damaged.

    A collective: see ``find_newest_sound``. Older means further back on the line of descent.

    Args:
        folder: The run's ``checkpoints/`` folder.
        start: From ``find_start``, the same on every rank. A checkpoint that the user named, and
            that the run begins from or goes back to, is never replaced by another one.

    Returns:
        The start with the newest sound checkpoint.

    Raises:
        CheckpointError: On every rank, if none is sound, or if the named one is not.
    """
    chosen = start.checkpoint
    if chosen is None:
        return start
    if start.given is not None and start.given != "never":
        damage = _find_damage(chosen)
        if damage:
            raise CheckpointError(str(chosen), damage, "Use another checkpoint")
        return start
    sound, damages = find_newest_sound(list_line(folder, whole=False)[::-1])
    if sound is None:
        raise _none_is_sound(folder, damages)
    return start if sound == chosen else replace(start, checkpoint=sound)


def find_newest_sound(checkpoints: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Check the files of checkpoints until one is sound.

    A collective: the ranks share the reading. The damaged checkpoints get the suffix ``.damaged``
    once an older one is found to be sound, and rank 0 logs a warning for each.

    Args:
        checkpoints: The newest first, the same on every rank.

    Returns:
        The first sound one, or None, and what is wrong with those before it.
    """
    damages: dict[Path, str] = {}
    for checkpoint in checkpoints:
        damage = _find_damage(checkpoint)
        if damage is None:
            _rename_damaged(damages, checkpoint)
            return checkpoint, list(damages.values())
        damages[checkpoint] = damage
    return None, list(damages.values())


def _find_damage(checkpoint: Path) -> str | None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return first_message(find_damage(checkpoint, rank, world_size))


def _rename_damaged(damages: dict[Path, str], sound: Path) -> None:
    """On rank 0, rename damaged checkpoints so that nobody takes them for whole ones."""
    torch.distributed.barrier()  # until every rank has read them
    if torch.distributed.get_rank() != 0:
        return
    for checkpoint, damage in damages.items():
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
        checkpoint.rename(aside)
        logger.warning(
            "%s. It is now called %s; the run resumes from %s", damage, aside.name, sound.name
        )


def _none_is_sound(folder: Path, damages: list[str]) -> CheckpointError:
    what = f"none of {len(damages)} checkpoints is sound: {'; '.join(damages)}"
    remedy = "Restore one of them, or start again in another logging.run_dir"
    return CheckpointError(str(folder), what, remedy)
