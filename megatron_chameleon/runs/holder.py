"""Which process holds a run folder, and whether it is alive.

Rank 0 writes ``run.lock``, locks it, and touches it every ``HEARTBEAT_SECONDS`` while it lives. On
the same machine the kernel says who holds the lock. On any other, where one cannot ask, the time of
the last touch tells. Nothing here takes the lock or writes.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.files import read_text
from megatron_chameleon.json_text import parse_json

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 30.0
MISSED_BEATS = 4
"""A run whose lock was not touched for so many intervals is taken for dead."""
OLD_SILENCE_SECONDS = 300.0
"""The same for a run of an earlier version, which touches nothing but its metrics."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder, or did so last.

    Attributes:
        values: What ``run.lock`` says; empty if nobody knows.
        is_alive: None if nobody can tell.
        sign_seconds: How long ago its last sign of life was; None if there is none.
    """

    values: Mapping[str, Any]
    is_alive: bool | None
    sign_seconds: float | None

    def __str__(self) -> str:
        """``host node1, pid 7, SLURM job 12, since 2026-11-24 10:00:00``; empty if unknown."""
        return describe_holder(self.values)


def describe_holder(values: Mapping[str, Any]) -> str:
    """What ``run.lock`` says, in words; empty if it says nothing."""
    names = {"host": "host", "pid": "pid", "slurm_job": "SLURM job", "since": "since"}
    return ", ".join(f"{word} {values[key]}" for key, word in names.items() if values.get(key))


def this_machine() -> str:
    """What tells one running kernel, and one container on it, from another; empty if unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def read_holder_values(path: Path) -> dict[str, Any]:
    """What a ``run.lock`` says about its last holder; empty if it cannot be read."""
    try:
        values = parse_json(read_text(path), str(path))
    except ChameleonError:
        return {}
    return values if isinstance(values, dict) else {}


def find_holder(run: Path, usual_step_seconds: float = 0.0) -> Holder:
    """Find out whether a process is writing a run folder.

    Args:
        run: The run folder.
        usual_step_seconds: Time of a step. A run of an earlier version gives no other sign.
    """
    path = run / LOCK_FILE
    values = read_holder_values(path)
    age = _age(path)
    sign = _youngest(age, _age(run / METRICS_FILE))
    if age is None:  # of a very early version, or copied without it
        return Holder({}, None, sign)
    if values.get("ended"):
        return Holder(values, False, sign)
    machine = values.get("machine")
    is_here = machine == this_machine() if machine else values.get("host") == platform.node()
    if is_here and (is_locked := _is_locked(path)) is not None:
        return Holder(values, is_locked or _is_running(values), sign)
    beat = values.get("heartbeat_seconds")
    if isinstance(beat, int | float) and 0 < beat < 10**6:
        return Holder(values, age < MISSED_BEATS * beat, sign)
    return Holder(values, sign is not None and _is_recent(sign, usual_step_seconds), sign)


def _is_recent(sign: float, usual_step_seconds: float) -> bool:
    return sign < max(OLD_SILENCE_SECONDS, 10 * usual_step_seconds)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _youngest(*ages: float | None) -> float | None:
    return min((age for age in ages if age is not None), default=None)


def _is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the file's lock; None if the kernel does not say.

    ``/proc/locks`` is read, because trying to lock the file would keep a run from starting.
    """
    try:
        found = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    inode = f":{found.st_ino}"
    for line in lines:
        words = line.split()
        # Some file systems (btrfs, overlays) show another device in stat than in this file.
        if "FLOCK" in words and (place in words or any(word.endswith(inode) for word in words)):
            return True
    return False


def _is_running(values: Mapping[str, Any]) -> bool:
    """Whether the process still exists, where the file system has no locks."""
    pid = values.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in words and any(b"chameleon" in word for word in words)


def holder_values(environment: Mapping[str, str]) -> dict[str, Any]:
    """What this process writes into ``run.lock``."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "slurm_job": environment.get("SLURM_JOB_ID"),
        "slurm_restart": int(environment.get("SLURM_RESTART_COUNT", "0")),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": this_machine(),
        "heartbeat_seconds": HEARTBEAT_SECONDS,
    }


def write_holder(lock: int, values: Mapping[str, Any]) -> None:
    """Write into a locked ``run.lock``.

    Raises:
        OSError: The file system refuses it.
    """
    content = (json.dumps(values) + "\n").encode()
    os.pwrite(lock, content, 0)
    os.truncate(lock, len(content))
