"""Let one run at a time write to a run folder: rank 0 holds a lock on its file ``run.lock``.

The kernel releases the lock when the process ends, however it ends, so a killed run leaves none
behind. On a network file system the server releases it, and a server that has not noticed that a
node died still holds the lock. A job that SLURM has requeued does not wait for that. While the run
lives, the file is touched from time to time, so that ``chameleon status`` on any machine can tell
(``runs/holder.py``).
"""

import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.files import open_lock
from megatron_chameleon.parallel.collectives import broadcast
from megatron_chameleon.runs.holder import (
    HEARTBEAT_SECONDS,
    LOCK_FILE,
    describe_holder,
    holder_values,
    read_holder_values,
    write_holder,
)

logger = logging.getLogger(__name__)

WAIT_SECONDS = 5.0
"""For a run that is ending: its job may restart before its last process is gone."""


@contextmanager
def lock_run(run_dir: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the run folder's lock. A collective: every rank of the run enters it.

    Args:
        run_dir: It is created if it does not exist.
        wait_seconds: How long to wait for another run that holds the lock.

    Raises:
        ConfigError: On every rank: another run holds it, or the file cannot be written.
    """
    lock, failure = None, None
    if torch.distributed.get_rank() == 0:
        try:
            lock = take_lock(run_dir, wait_seconds)
        except ConfigError as error:
            failure = (error.where, error.what, error.remedy)
    try:
        if failure := broadcast(failure):
            raise ConfigError(*failure)
        with _heartbeat(lock) if lock is not None else nullcontext():
            yield
    finally:
        if lock is not None:
            _note_end(lock)
            os.close(lock)


@contextmanager
def _heartbeat(lock: int) -> Iterator[None]:
    """Touch the file while the block runs. A file system that hangs holds up only the thread."""
    done = threading.Event()
    descriptor = os.dup(lock)

    def beat() -> None:
        try:
            while not done.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):
                    os.utime(descriptor)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1.0)


def _note_end(lock: int) -> None:
    """Note in the file that its holder has ended by itself."""
    with suppress(OSError, ValueError):
        values = json.loads(os.pread(lock, 1 << 16, 0))
        write_holder(lock, {**values, "ended": time.strftime("%Y-%m-%d %H:%M:%S")})


def take_lock(run_dir: Path, wait_seconds: float) -> int:
    """Lock the folder for this process.

    Returns:
        A file descriptor that holds the lock as long as it is open.

    Raises:
        ConfigError: Another run holds it, or the file cannot be written.
    """
    path = run_dir / LOCK_FILE
    own = holder_values(os.environ)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(path, wait_seconds)
        if lock is None:
            holder = read_holder_values(path)
            if not _is_earlier_start(holder, own):
                who = describe_holder(holder)
                what = f"another run{who and f' ({who})'} is writing here"
                remedy = "Wait for it, end it, or choose another logging.run_dir"
                raise ConfigError(str(run_dir), what, remedy)
            logger.warning(
                f"{path}: still locked by an earlier start of this job, which SLURM has ended"
            )
            lock = _replace_locked(path)
        write_holder(lock, own)
    except OSError as error:
        what = f"the run folder cannot be written ({error.strerror or error})"
        raise ConfigError(str(run_dir), what, "Choose another logging.run_dir") from error
    return lock


def _open_locked(path: Path, wait_seconds: float) -> int | None:
    """Open the file and lock it; None if another process held the lock all the time."""
    deadline = time.monotonic() + wait_seconds
    while True:
        lock = open_lock(path, ConfigError)
        if _try_lock(lock, path) and _is_still_there(lock, path):
            return lock
        os.close(lock)
        if time.monotonic() >= deadline:
            return None
        time.sleep(min(0.2, wait_seconds))


def _try_lock(lock: int, path: Path) -> bool:
    """Whether it was locked, or the file system does not support locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            f"{path}: this file system does not support locks ({error.strerror}); do not start a "
            "second run here"
        )
    return True


def _is_still_there(lock: int, path: Path) -> bool:
    """False if it was removed or replaced between opening and locking."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _replace_locked(path: Path) -> int:
    """Put a new, locked file in place of the one that a dead node has locked."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    lock = open_lock(temporary, ConfigError)
    _try_lock(lock, temporary)
    temporary.replace(path)
    return lock


def _is_earlier_start(holder: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the holder is an earlier start of the same job.

    SLURM restarts a job only after its earlier start has ended or its node is gone.
    """
    same = own["slurm_job"] is not None and holder.get("slurm_job") == own["slurm_job"]
    restart = holder.get("slurm_restart", 0)
    return same and isinstance(restart, int) and restart < own["slurm_restart"]
