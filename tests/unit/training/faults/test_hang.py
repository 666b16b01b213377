"""When the watch reports, what it reports, and that it always ends the process."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_chameleon.training.faults import hang
from megatron_chameleon.training.faults.hang import HangWatch, locate, summarize

pytestmark = pytest.mark.serial  # processes that must act within seconds

# A process that works for longer than its limit, saves for longer, and then hangs: in Python, or in
# C code that holds the interpreter's lock, as a call through PyDLL does.
PROCESS = """
import ctypes, sys, time
from pathlib import Path
from megatron_chameleon.training.faults.hang import HangWatch

with HangWatch(0.5, Path(sys.argv[1]) / "logs", 0, 1) as watch:
    for _ in watch.steps(iter(range(1, 9)), 0):
        time.sleep(0.2)
    watch.begin("saving", 8, is_long=True)
    time.sleep(1.2)
    watch.begin("step", 9)
    time.sleep(1.2)  # another rank may still be saving
    print("healthy", flush=True)
    watch.begin("step", 10)
    ctypes.PyDLL(None).sleep(60) if sys.argv[2] == "frozen" else time.sleep(60)
"""


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_process_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hang-rank00007.txt").write_text("of an earlier job")
    result = run(tmp_path, "asleep")
    assert (result.returncode, result.stdout) == (hang.EXIT_CODE, "healthy\n")
    assert result.stderr.startswith("error: step 10: nothing moved for ")
    text = (tmp_path / "logs" / "hang-rank00000.txt").read_text()
    assert text.startswith('{"rank": 0, ')
    (earlier,) = (tmp_path / "logs").glob("hang-before-*/hang-rank00007.txt")
    assert earlier.read_text() == "of an earlier job"


def test_a_process_whose_interpreter_is_blocked(tmp_path: Path) -> None:
    result = run(tmp_path, "frozen")
    assert (result.returncode, result.stdout) == (1, "healthy\n")
    assert "Timeout (0:00:0" in result.stderr
    assert 'File "<string>", line 15 in <module>' in result.stderr


def test_a_watch_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(hang.os, "_exit", lambda code: (codes.append(code), ended.set()))
    # faulthandler's clock cannot hold such a limit; the config refuses it
    with HangWatch(1e12, tmp_path, 0, 1):
        assert ended.wait(20)
    assert codes == [hang.EXIT_CODE]
    line = capfd.readouterr().err
    assert line.startswith("error: hang watch: the thread that watches for hangs has failed (")
    assert line.endswith("training.hang_seconds=0 runs without it.\n")


def test_no_limit_needs_no_thread(tmp_path: Path) -> None:
    with HangWatch(0, tmp_path, 0, 1):
        assert "hang-watch" not in [thread.name for thread in threading.enumerate()]


def where(function: Callable[[], object], release: Callable[[], object]) -> tuple[str, bool]:
    """What ``locate`` says about a thread that is in the function."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    time.sleep(0.3)
    found = locate(sys._current_frames()[thread.ident or 0])
    release()
    thread.join()
    return found


def test_waiting_for_data_is_not_a_collective() -> None:
    future: Future[Any] = Future()

    def wait_for_data() -> None:
        future.result()

    place, waits = where(wait_for_data, lambda: future.set_result(None))
    assert place.startswith("faults/test_hang.py:") and place.endswith(" in wait_for_data")
    assert not waits


def test_a_collective_that_nobody_joins(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)  # the second process never joins

    def join() -> None:
        with contextlib.suppress(RuntimeError):
            dist.init_process_group(
                "gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=2)
            )

    place, waits = where(join, lambda: None)
    assert waits
    assert place.startswith("faults/test_hang.py:") and place.endswith(" in join")


def test_a_wait_for_a_handle_or_the_gpu() -> None:
    frames = []

    class Work:
        def wait(self) -> None:
            frames.append(sys._getframe(1))

        item = wait

    def work() -> None:
        Work().wait()

    def other() -> None:
        frames.append(sys._getframe())

    work()
    assert locate(frames[0])[1]
    other()
    assert not locate(frames[1])[1]


def report(rank: int, where: str, *, waits: bool, doing: str = "a") -> dict[str, Any]:
    return {"rank": rank, "host": f"n{rank}", "step": 7, "doing": doing, "seconds": 480.4,
            "waits_for_others": waits, "where": where}  # fmt: skip


def test_the_summary_names_who_does_not_wait() -> None:
    reports = [report(rank, "d/ddp.py:5 in sync", waits=True) for rank in range(6)]
    reports[3] = report(
        3, "data/batches/reader.py:9 in read", waits=False, doing="waiting for data"
    )
    words = str(summarize(reports, 8, Path("logs")))
    assert words == (
        "step 7: nothing moved for 480 s: rank 3 on n3 does not wait for others but is at "
        "data/batches/reader.py:9 in read (waiting for data, step 7); no stacks from rank 6, "
        "7, which may be frozen or dead; 5 of 8 ranks wait in a collective, such as rank 0 at "
        "d/ddp.py:5 in sync (a). Look "
        "at the stacks in logs/hang-rank*.txt. The same command resumes from the last checkpoint; "
        "training.hang_seconds sets the limit."
    )


def test_the_summary_stays_short() -> None:
    reports = [report(rank, "x.py:1 in f", waits=False) for rank in range(1000)]
    words = str(summarize(reports, 2000, Path("logs")))
    assert "996 more ranks do not wait either; no stacks from rank 1000, 1001, 1002" in words
    assert len(words) < 900


def test_one_rank_reports(tmp_path: Path) -> None:
    assert hang._is_first_to_create(tmp_path / "hang.txt")
    assert not hang._is_first_to_create(tmp_path / "hang.txt")
