"""Save and prune the checkpoints of a run; each is whole or absent.

A checkpoint is written under a hidden name and renamed when everything in it, ``state.json`` last,
has reached the disk. It is renamed back before it is deleted. So a folder called ``step_00001000``
is always whole, whenever the job is killed. The engine decides which tensors are in it, and
``SHA256SUMS`` shows later whether a file has changed.
"""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    STATE_FORMAT,
    flush_to_disk,
    load_state,
    step_folder,
    step_of,
)
from megatron_chameleon.checkpoint.state.integrity import write_sums
from megatron_chameleon.checkpoint.state.line import list_line
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import CheckpointConfig, Config
from megatron_chameleon.errors import CheckpointError, TrainingError, first_line
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import first_message, gather_on_rank_0

VALIDATION_LOSS = "validation_loss"
"""The entry of ``state.json`` with the held-out loss after the checkpoint's step."""
SPARE_BYTES = 32 * 2**20  # for indices, configs and the file system's own needs


class StagedFiles(Protocol):
    """This rank's files of a checkpoint, ready to be written.

    Attributes:
        digests: SHA-256 of each file by its name, once it is written.
    """

    digests: dict[str, str]

    def write(self) -> None:
        """Write the files, in any thread; a failure is kept for ``finish``."""

    def finish(self) -> None:
        """Write the index of all ranks' files. A collective.

        Raises:
            OSError: On every rank, if one of them failed.
        """


class Snapshot(Protocol):
    """A training state that is about to be saved."""

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank would write if each tensor were written by its first owner."""

    def stage(self, folder: Path, *, keep: bool) -> StagedFiles:
        """Plan the files of an existing folder.

        With ``keep``, the staged tensors do not change when training continues.
        """


class CheckpointedEngine(Protocol):
    """What saving and loading need of a training engine."""

    config: Config

    def snapshot(self) -> Snapshot: ...

    def restore(self, checkpoint: Path, step: int) -> None: ...

    def restore_weights(self, checkpoint: Path) -> None: ...


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        step: Updates done.
        temporary: The hidden folder that is written.
        final: The name that it gets when it is whole.
        extra: Further entries of ``state.json``.
        files: This rank's files.
        thread: The thread that writes them.
    """

    step: int
    temporary: Path
    final: Path
    extra: dict[str, Any]
    files: StagedFiles
    thread: threading.Thread


class Saver:
    """Saves the checkpoints of a run, one after the other.

    With ``checkpoint.async_save`` the training waits only until its state is copied to the host's
    memory. A thread of each rank then writes it, and the checkpoint is whole when all threads have
    finished.

    Every method is a collective: all ranks call it. So is the end of its ``with`` block, which
    waits for the last checkpoint, even after an error that all ranks raise (``TrainingError``).

    Args:
        folder: The run's ``checkpoints/`` folder.
        engine: The engine whose state is saved; its config is saved with it.
        on_saved: Called with each checkpoint that is whole.
    """

    def __init__(
        self, folder: Path, engine: CheckpointedEngine, on_saved: Callable[[Path], None]
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._on_saved = on_saved
        self._pending: _Pending | None = None
        self._deletions = ThreadPoolExecutor(1, thread_name_prefix="deletion")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, TrainingError):
                self.wait()
        finally:
            self._deletions.shutdown()

    def is_due(self, step: int) -> bool:
        """Whether the config wants a checkpoint after this step, counted from 1."""
        config = self._engine.config
        every = config.checkpoint.every_steps
        return step == config.training.steps or (every > 0 and step % every == 0)

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Begin a checkpoint once the one before it is whole; without ``async_save``, finish it.

        Args:
            step: Updates done.
            extra: Further entries of ``state.json``: those of the tokenizer and of the data.

        Raises:
            CheckpointError: On every rank, if any could not write; the folder is then as it was
                before.
        """
        self.wait()
        is_async = self._engine.config.checkpoint.async_save
        final = self._folder / step_folder(step)
        temporary = self._folder / f".{final.name}.saving"
        snapshot = self._engine.snapshot()
        _on_all_ranks(final, lambda: _make_room(self._folder, temporary, snapshot.local_bytes))
        files = _on_all_ranks(
            final, lambda: snapshot.stage(temporary, keep=is_async), remove=temporary
        )
        # a daemon thread, so that it stops when its process fails
        thread = threading.Thread(target=files.write, name="checkpoint", daemon=True)
        self._pending = _Pending(step, temporary, final, extra, files, thread)
        thread.start()
        if not is_async:
            self.wait()

    def poll(self) -> None:
        """Finish the checkpoint that is being written, if all ranks have written their files."""
        if self._pending is None:
            return
        is_alive = int(self._pending.thread.is_alive())
        working = torch.tensor([is_alive], device=platform.device())
        torch.distributed.all_reduce(working)
        if not working.item():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            CheckpointError: On every rank, if any could not write.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.thread.join()
        _on_all_ranks(pending.final, pending.files.finish, remove=pending.temporary)
        digests = gather_on_rank_0(pending.files.digests)
        _on_all_ranks(pending.final, lambda: _finish(pending, self._engine.config, digests))
        if torch.distributed.get_rank() == 0:
            for old in disposable(list_line(self._folder), self._engine.config.checkpoint):
                hidden = _hide(old)  # at once; deleting its data may take a while
                self._deletions.submit(shutil.rmtree, hidden, ignore_errors=True)
        self._on_saved(pending.final)


def disposable(checkpoints: list[Path], config: CheckpointConfig) -> list[Path]:
    """The checkpoints that none of ``keep_last``, ``keep_every`` and ``keep_best`` keeps.

    Args:
        checkpoints: Those of the run's line, oldest first.
        config: Says which checkpoints to keep.
    """
    every = config.keep_every
    older = checkpoints[: -config.keep_last]
    best = _best(checkpoints) if config.keep_best else None
    return [path for path in older if path != best and (not every or step_of(path) % every)]


def _best(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss, if any has one; of equal ones the first."""
    losses = {path: _held_out_loss(path) for path in checkpoints}
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__, default=None)


def _held_out_loss(checkpoint: Path) -> float | None:
    """The held-out loss after its step; None if it was not measured or cannot be read."""
    try:
        loss = load_state(checkpoint).get(VALIDATION_LOSS)
    except CheckpointError:
        return None
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        return None
    return loss if math.isfinite(loss) else None


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; an interrupted deletion leaves nothing that looks whole."""
    shutil.rmtree(_hide(checkpoint), ignore_errors=True)


def _hide(checkpoint: Path) -> Path:
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleting")
    checkpoint.rename(hidden)
    return hidden


def _make_room(folder: Path, temporary: Path, local_bytes: int) -> None:
    """Clear what interrupted saves and deletions left, and check that the new checkpoint fits."""
    sizes = gather_on_rank_0(local_bytes)
    if sizes is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".step_*"), *folder.glob(".branch_*.partial")):
        if leftover.is_symlink():  # somebody else's; nothing behind it is touched
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    free, total = shutil.disk_usage(folder).free, sum(sizes) + SPARE_BYTES
    if free < total:
        raise OSError(f"disk full: {free:,} bytes are free and {total:,} are needed")
    temporary.mkdir()


def _finish(pending: _Pending, config: Config, digests: list[dict[str, str]] | None) -> None:
    """On rank 0, write the small files and give the checkpoint its name."""
    if digests is None:
        return
    temporary, final = pending.temporary, pending.final
    try:
        save_config(config, temporary / "config.yaml")
        values = {"format": STATE_FORMAT, "step": pending.step, "has_checksums": True}
        state = (json.dumps({**values, **pending.extra}, indent=1) + "\n").encode()
        known = {name: digest for of_rank in digests for name, digest in of_rank.items()}
        write_sums(temporary, {**known, STATE_FILE: hashlib.sha256(state).hexdigest()})
        (temporary / STATE_FILE).write_bytes(state)
        for path in temporary.iterdir():
            if path.name not in known:  # the ranks have flushed their own files already
                flush_to_disk(path)
        flush_to_disk(temporary)
        if final.exists():
            delete(final)
        temporary.rename(final)
        flush_to_disk(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _on_all_ranks(final: Path, action: Callable[[], Any], remove: Path | None = None) -> Any:
    """Run ``action`` on every rank; if it failed on any, all of them raise the first failure.

    Args:
        final: The checkpoint that an error names.
        action: What to run; its ``OSError`` counts as a failure.
        remove: A folder that rank 0 removes after a failure.

    Raises:
        CheckpointError: On every rank, if the action failed on any.
    """
    failure, result = None, None
    try:
        result = action()
    except OSError as error:
        failure = first_line(error)
    first = first_message(failure)
    if first:
        if remove is not None and torch.distributed.get_rank() == 0:
            shutil.rmtree(remove, ignore_errors=True)
        remedy = (
            "Free disk space and start again with --resume auto; older checkpoints are untouched"
        )
        raise CheckpointError(str(final), f"could not be saved: {first}", remedy)
    return result
