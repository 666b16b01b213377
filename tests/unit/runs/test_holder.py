"""Whether a run is alive: by the kernel's list of locks here, by the heartbeat elsewhere."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.runs import holder as holder_module
from megatron_chameleon.runs.holder import HEARTBEAT_SECONDS, LOCK_FILE, find_holder
from megatron_chameleon.training.run import lock as lock_module
from megatron_chameleon.training.run.lock import take_lock


def write(run: Path, age: float, metrics_age: float | None = None, **values: Any) -> None:
    path = run / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "x", **values}))
    os.utime(path, (time.time() - age,) * 2)
    if metrics_age is not None:
        (run / "metrics.jsonl").touch()
        os.utime(run / "metrics.jsonl", (time.time() - metrics_age,) * 2)


def test_the_lock_of_this_machine(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, 0)
    os.utime(lock, (0, 0))
    found = find_holder(tmp_path)
    assert found.is_alive and found.values["pid"] == os.getpid()
    before = (tmp_path / LOCK_FILE).read_bytes()
    os.close(take_second(tmp_path))  # a look keeps nobody from starting
    os.close(lock)
    assert find_holder(tmp_path).is_alive is False
    assert (tmp_path / LOCK_FILE).read_bytes() == before


def take_second(run: Path) -> int:
    """A lock of another folder: that of ``run`` must not be mixed up with it."""
    (run / "other").mkdir()
    lock = take_lock(run / "other", 0)
    assert find_holder(run / "other").is_alive
    return lock


def test_a_run_that_has_ended_by_itself(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, 0)
    lock_module._note_end(lock)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["ended"]
    assert find_holder(tmp_path).is_alive is False, "although the lock is still held"
    os.close(lock)


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    lock = take_lock(tmp_path, 0)
    with lock_module._heartbeat(lock):
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > time.time() - 60
    os.close(lock)
    os.close(take_lock(tmp_path, 0))  # the thread holds it no more


@pytest.mark.parametrize(
    ("age", "metrics_age", "values", "is_alive"),
    [
        (10, None, {"machine": "b", "heartbeat_seconds": HEARTBEAT_SECONDS}, True),
        (110, None, {"machine": "b", "heartbeat_seconds": HEARTBEAT_SECONDS}, True),
        (130, 1, {"machine": "b", "heartbeat_seconds": HEARTBEAT_SECONDS}, False),
        (10, 1, {"machine": "b", "heartbeat_seconds": 30, "ended": "y"}, False),
        (10**6, 100, {}, True),  # of an earlier version
        (10**6, 1000, {}, False),
        (10**6, 1000, {"usual": 300.0}, True),
        (10**6, None, {}, False),
        (10, None, {"heartbeat_seconds": "30"}, True),
        (10**6, None, {"heartbeat_seconds": -1, "machine": 5, "host": [], "pid": {}}, False),
    ],
)
def test_another_machine(
    age: float, metrics_age: float | None, values: dict[str, Any], is_alive: bool, tmp_path: Path
) -> None:
    usual = values.pop("usual", 0.0)
    write(tmp_path, age, metrics_age, **values)
    found = find_holder(tmp_path, usual)
    assert found.is_alive is is_alive
    assert found.sign_seconds == pytest.approx(min(age, metrics_age or age), abs=30)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"host": "x', b"{}" * 5, b"[" * 9999])
def test_a_lock_file_that_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    found = find_holder(tmp_path)
    assert found.values == {} and str(found) == ""
    assert found.is_alive is True, "it was touched just now"


def test_no_lock_file(tmp_path: Path) -> None:
    assert find_holder(tmp_path).is_alive is None
    (tmp_path / "metrics.jsonl").touch()
    found = find_holder(tmp_path)
    assert found.is_alive is None and found.sign_seconds == pytest.approx(0, abs=30)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is looked for by its number, and must be a training."""
    monkeypatch.setattr(holder_module, "_is_locked", lambda path: False)
    os.close(take_lock(tmp_path, 0))
    assert find_holder(tmp_path).is_alive is False
    words = b"python\0-m\0megatron_chameleon\0train\0x.yaml\0"
    read_bytes = Path.read_bytes
    name = f"/proc/{os.getpid()}/cmdline"
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: words if str(path) == name else read_bytes(path)
    )
    assert find_holder(tmp_path).is_alive is True
