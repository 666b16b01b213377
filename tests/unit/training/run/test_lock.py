"""Which run may write to a run folder, and the error of a second one."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.runs.holder import LOCK_FILE
from megatron_chameleon.training.run.lock import take_lock


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def be_job(monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def test_a_second_run_is_told_who_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be_job(monkeypatch, "12", 0)
    lock = take_lock(tmp_path / "run", 0)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ConfigError) as caught:
        take_lock(tmp_path / "run", 0)
    holder = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
    who = f"host {holder['host']}, pid {os.getpid()}, SLURM job 12, since {holder['since']}"
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: another run ({who}) is writing here. Wait for it, end it, or choose "
        "another logging.run_dir."
    )
    os.close(lock)
    os.close(take_lock(tmp_path / "run", 0))
    holder = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
    assert holder["slurm_job"] is None, "the file names the last holder"


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_chameleon.training.run.lock import take_lock\n"
        "take_lock(Path(sys.argv[1]), 0); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"pid {other.pid}, since"):
            take_lock(tmp_path, 0)
        other.send_signal(signal.SIGKILL)
        os.close(take_lock(tmp_path, 30))


def test_a_requeued_job_is_not_stopped_by_the_lock_of_its_dead_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    be_job(monkeypatch, "12", 0)
    stale = take_lock(tmp_path, 0)  # a server may hold the lock of a dead node
    be_job(monkeypatch, "12", 1)
    lock = take_lock(tmp_path, 0)
    assert "run.lock: still locked by an earlier start of this job" in caplog.text
    be_job(monkeypatch, "13", 2)
    with pytest.raises(ConfigError, match="SLURM job 12"):
        take_lock(tmp_path, 0)  # the new lock keeps other jobs out
    os.close(stale)
    with pytest.raises(ConfigError, match="SLURM job 12"):
        take_lock(tmp_path, 0)
    os.close(lock)
    os.close(take_lock(tmp_path, 0))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_another_step_of_the_same_job_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_job(monkeypatch, "12", 1)
    lock = take_lock(tmp_path, 0)
    with pytest.raises(ConfigError, match="SLURM job 12"):
        take_lock(tmp_path, 0)
    os.close(lock)


def test_without_locks_the_run_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(take_lock(tmp_path, 0))
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "run.lock: this file system does not support locks (No locks available)" in (
        warning.getMessage()
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"run: the run folder cannot be written \(.+\)\. Choose"):
        take_lock(tmp_path / "run", 0)
