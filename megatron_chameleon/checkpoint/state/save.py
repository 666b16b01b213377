"""Save and prune the checkpoints of a run: whole or not there.

A checkpoint is written under a hidden name and renamed when everything in it, ``state.json`` last,
has reached the disk. It is renamed back before it is deleted. So whatever is called
``step_00001000`` is whole, whenever the job is killed. What lies in it is the engine's own, and
``SHA256SUMS`` tells later whether it still does.
"""

import hashlib
import json
import os
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
    list_checkpoints,
    step_folder,
    step_of,
)
from megatron_chameleon.checkpoint.state.integrity import write_sums
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import CheckpointConfig, Config
from megatron_chameleon.errors import CheckpointError, TrainingError, first_line
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import first_message, gather_on_rank_0

SPARE_BYTES = 32 * 2**20  # for indices, configs and the file system's own needs


class StagedFiles(Protocol):
    """This rank's files of a checkpoint, ready to be written."""

    digests: dict[str, str]

    def write(self) -> None:
        """Write them, in any thread; a failure is kept for ``finish``."""

    def finish(self) -> None:
        """Join all ranks' files; ``OSError`` on every rank if one of them failed."""


class Snapshot(Protocol):
    """A training state that is about to be saved."""

    @property
    def local_bytes(self) -> int:
        """What this rank would write if each tensor were written by its first owner."""

    def stage(self, folder: Path, *, keep: bool) -> StagedFiles:
        """Plan the files of a folder that is there.

        With ``keep``, what is staged does not change when training goes on.
        """


class CheckpointedEngine(Protocol):
    """What saving and loading need of a training engine."""

    config: Config

    def snapshot(self) -> Snapshot: ...

    def restore(self, checkpoint: Path, step: int) -> None: ...

    def restore_weights(self, checkpoint: Path) -> None: ...


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    temporary: Path
    final: Path
    extra: dict[str, Any]
    files: StagedFiles
    thread: threading.Thread


class Saver:
    """Saves the checkpoints of a run, one after the other.

    With ``checkpoint.async_save`` the training waits only until its state is copied to the host's
    memory; a thread of each rank writes it, and the checkpoint is whole when all have.

    Every method is a collective: all ranks call it. So is its end as a context manager, which
    waits for the last checkpoint, also after an error that all ranks meet (``TrainingError``).

    Args:
        folder: The run's ``checkpoints/`` folder.
        engine: Its state is saved, and its config beside it.
        say: Takes a line for each checkpoint that is whole.
    """

    def __init__(
        self, folder: Path, engine: CheckpointedEngine, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._say = say
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
        """Begin a checkpoint, after the one before is whole; without ``async_save``, end it too.

        Args:
            step: Updates done.
            extra: Further entries of ``state.json``, those of the tokenizer and of the data.

        Raises:
            CheckpointError: On every rank, if any could not write; the folder then holds what it
                held before.
        """
        self.wait()
        is_async = self._engine.config.checkpoint.async_save
        final = self._folder / step_folder(step)
        temporary = self._folder / f".{final.name}.saving"
        snapshot = self._engine.snapshot()
        _together(final, lambda: _make_room(self._folder, temporary, snapshot.local_bytes))
        files = self._or_remove(final, temporary, lambda: snapshot.stage(temporary, keep=is_async))
        # a daemon: a process that fails does not write on
        thread = threading.Thread(target=files.write, name="checkpoint", daemon=True)
        self._pending = _Pending(step, temporary, final, extra, files, thread)
        thread.start()
        if not is_async:
            self.wait()

    def poll(self) -> None:
        """End the checkpoint that is being written if all ranks have written their files."""
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
        self._or_remove(pending.final, pending.temporary, pending.files.finish)
        digests = gather_on_rank_0(pending.files.digests)
        _together(pending.final, lambda: _finish(pending, self._engine.config, digests))
        if torch.distributed.get_rank() == 0:
            for old in disposable(list_checkpoints(self._folder), self._engine.config.checkpoint):
                doomed = _doom(old)  # at once, while its data may take a while
                self._deletions.submit(shutil.rmtree, doomed, ignore_errors=True)
        self._say(f"saved {pending.final}")

    def _or_remove(self, final: Path, temporary: Path, action: Callable[[], Any]) -> Any:
        try:
            return _together(final, action)
        except CheckpointError:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def disposable(checkpoints: list[Path], config: CheckpointConfig) -> list[Path]:
    """Those that neither ``keep_last`` nor ``keep_every`` keeps.

    Args:
        checkpoints: Whole ones, oldest first.
        config: Says which stay.
    """
    every = config.keep_every
    older = checkpoints[: -config.keep_last]
    return [path for path in older if not every or step_of(path) % every]


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; an interrupted deletion leaves nothing that looks whole."""
    shutil.rmtree(_doom(checkpoint), ignore_errors=True)


def _doom(checkpoint: Path) -> Path:
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
    checkpoint.rename(doomed)
    return doomed


def _make_room(folder: Path, temporary: Path, local_bytes: int) -> None:
    """Clear what interrupted saves and deletions left, and see that the new checkpoint has room."""
    sizes = gather_on_rank_0(local_bytes)
    if sizes is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free, total = shutil.disk_usage(folder).free, sum(sizes) + SPARE_BYTES
    if free < total:
        raise OSError(f"disk full: {free:,} bytes are free and {total:,} are needed")
    temporary.mkdir()


def _finish(pending: _Pending, config: Config, digests: list[dict[str, str]] | None) -> None:
    """Rank 0: write the small files, and give the checkpoint its name."""
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
            if path.name not in known:  # those the ranks have brought to the disk themselves
                _sync(path)
        _sync(temporary)
        if final.exists():
            delete(final)
        temporary.rename(final)
        _sync(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(final: Path, action: Callable[[], Any]) -> Any:
    """Run ``action`` on every rank; if it failed on any, all of them raise the first failure."""
    failure, result = None, None
    try:
        result = action()
    except OSError as error:
        failure = first_line(error)
    first = first_message(failure)
    if first:
        remedy = (
            "Free disk space and start again with --resume auto; older checkpoints are untouched"
        )
        raise CheckpointError(str(final), f"could not be saved: {first}", remedy)
    return result
