"""A folder that appears whole or not at all."""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import flush_to_disk
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import empty_folder, own_folder, writing

FLUSH_SECONDS = 1.0


@contextmanager
def partial_folder(destination: Path, progress: Callable[[str], None]) -> Iterator[Path]:
    """A hidden, locked and empty folder beside the destination, which is removed afterwards.

    Args:
        destination: The folder that is to appear.
        progress: Called with a line if an interrupted conversion left something behind.

    Raises:
        CheckpointError: The folder cannot be written, its name is that of a link or of someone
            else's folder, or another conversion is using it.
    """
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    missing = [folder for folder in partial.parents if not folder.exists()]
    try:
        with writing(destination, CheckpointError):
            _own(partial)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(lock, destination)
                if empty_folder(partial):
                    progress(f"removed what an interrupted conversion left in {partial}")
                try:
                    yield partial
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)
    finally:
        for folder in missing:  # if there is no destination in them
            with suppress(OSError):
                folder.rmdir()


def _own(partial: Path) -> None:
    """Create the hidden folder, or take over what an interrupted conversion left."""
    own_folder(partial, CheckpointError, "give another destination")


def _lock(descriptor: int, destination: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            str(destination), "another conversion is writing it", "Wait for it, or stop it"
        ) from error


@contextmanager
def flushing(folder: Path) -> Iterator[None]:
    """Flush what is written into a folder to the disk continuously, not only at the end.

    The kernel would collect gigabytes before it starts, and a final flush would wait for all of
    them.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            with suppress(OSError):  # the writer fails too, and the last flush covers all files
                sync(folder)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def sync(folder: Path) -> None:
    """Flush a folder and all in it to the disk, so that it is whole even after a crash."""
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)
