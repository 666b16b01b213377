"""A folder that appears whole or not at all."""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_chameleon.errors import CheckpointError

FLUSH_SECONDS = 1.0


@contextmanager
def partial_folder(destination: Path, progress: Callable[[str], None]) -> Iterator[Path]:
    """A hidden folder beside the destination, locked, empty, and gone afterwards.

    Raises:
        CheckpointError: It cannot be written, or another conversion is at work in it.
    """
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        try:
            _take(lock, destination)
            if any(partial.iterdir()):
                for path in partial.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                progress(f"removed what an interrupted conversion left in {partial}: starts anew")
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        raise CheckpointError(
            str(destination), f"cannot be written ({error})", "Free space, or give another place"
        ) from error


def _take(lock: int, destination: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            str(destination), "another conversion is writing it", "Wait for it, or end it"
        ) from error


@contextmanager
def flushing(folder: Path) -> Iterator[None]:
    """Bring what is written into a folder to the disk all the time, not at the end only.

    The kernel collects gigabytes before it begins, and whoever waits for the disk then waits for
    all of them.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            with suppress(OSError):  # whoever writes meets it too, and the end looks at all files
                sync(folder)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def sync(folder: Path) -> None:
    """Bring everything to the disk, so that a crash after the renaming finds it whole."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
