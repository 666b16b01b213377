"""Report where each rank of a hanging run stands, and end the run so that it is started again.

Every two seconds, a thread checks what this process is doing and for how long. Past the limit it
writes the stacks of all threads to ``logs/hang-rank00003.txt``. One rank then reads the files of
all ranks and reports in one line which of them do not wait for the others. Every rank ends with
``EXIT_CODE``.

That thread needs the interpreter, which may be blocked too, for example by a page of a mapped file
on a dead server. So the thread restarts faulthandler's timer at every check. If the timer runs out,
faulthandler prints the stacks on standard error and ends the process with exit code 1. If the
thread itself fails, it ends the process with ``EXIT_CODE`` and a line that says so.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from megatron_chameleon.errors import TrainingError, first_line
from megatron_chameleon.files import replace_file, write_text
from megatron_chameleon.training.metrics.stragglers import StepClock

T = TypeVar("T")

EXIT_CODE = 124
"""The exit code of ``timeout``. ``slurm/common.sh`` takes the process for dead and requeues the
job."""
PATIENCE = 4
"""How many times the limit loading, saving, sampling, and a step after one of them may take."""
PREFIX = "hang-rank"
SUMMARY = "hang.txt"
# What the innermost line contains where a rank waits for other ranks, or for its GPU, which then
# waits for other ranks.
_WAITS = (".wait(", ".item()", ".tolist()", "synchronize(")


class HangWatch:
    """Watches this process while it is entered.

    Args:
        limit_seconds: How long a step may take; 0 switches the watch off.
        folder: Where the reports are written.
        rank: Of this process.
        world_size: Number of processes of the run.
        record: Takes the step and the report, on the rank that reports for all.
    """

    def __init__(
        self,
        limit_seconds: float,
        folder: Path,
        rank: int,
        world_size: int,
        record: Callable[[int, str], None] = lambda step, text: None,
    ) -> None:
        self._limit = limit_seconds
        self._grace = min(60.0, self._limit)  # how much later than this watch faulthandler acts
        self._folder = folder
        self._rank, self._world_size = rank, world_size
        self._record = record
        self._state = ("starting", 0, time.monotonic(), self._limit * PATIENCE)
        self._after_long = True
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self.clock: StepClock | None = None
        """The engine's, which knows in which part of a step the process is."""

    def __enter__(self) -> "HangWatch":
        if self._limit:
            if self._rank == 0:
                _archive_reports(self._folder)
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def begin(self, doing: str, step: int, *, is_long: bool = False) -> None:
        """Note what the process does from now on.

        Args:
            doing: A few words for the report.
            step: Counted from 1; 0 before the first.
            is_long: Whether this may take ``PATIENCE`` times as long. So may the step after it, in
                which the other ranks wait for those that did it.
        """
        limit = self._limit * (PATIENCE if is_long or self._after_long else 1)
        if is_long or doing == "step":
            self._after_long = is_long
        self._state = (doing, step, time.monotonic(), limit)

    def steps(self, batches: Iterator[T], steps_done: int) -> Iterator[tuple[int, T]]:
        """Number the batches, and note when the process waits for one and when a step begins.

        Args:
            batches: One for each step after ``steps_done``.
            steps_done: Steps before the first batch.

        Yields:
            The step, counted from 1, and its batch.
        """
        for step in itertools.count(steps_done + 1):
            self.begin("waiting for data", step)
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self.clock is not None:
                self.clock.data_seconds += time.perf_counter() - start
            self.begin("step", step)
            yield step, batch

    def _watch(self) -> None:
        """Watch until the end. A watch that fails ends the run, which nobody would watch then."""
        try:
            self._poll()
        except BaseException as error:  # whatever it is, nobody would see it in this thread
            what = f"the thread that watches for hangs has failed ({first_line(error)})"
            remedy = "Run the same command to resume; training.hang_seconds=0 runs without it"
            print(
                f"error: {TrainingError('hang watch', what, remedy)}", file=sys.stderr, flush=True
            )
            os._exit(EXIT_CODE)

    def _poll(self) -> None:
        poll = min(2.0, self._limit / 4)
        while not self._done.wait(poll):
            doing, step, since, limit = self._state
            elapsed = time.monotonic() - since
            if elapsed > limit:
                self._report(doing, step, elapsed)
            faulthandler.dump_traceback_later(limit + self._grace, exit=True)

    def _report(self, doing: str, step: int, elapsed: float) -> None:
        """Write this rank's file, let one rank report for all, and end the process."""
        # The file system may hang too.
        faulthandler.dump_traceback_later(self._grace + 15, exit=True)
        own = self._own_report(doing, step, elapsed)
        path = self._folder / f"{PREFIX}{self._rank:05d}.txt"
        try:
            with replace_file(path, TrainingError) as file:
                file.write((json.dumps(own) + "\n\n").encode())
                file.flush()
                faulthandler.dump_traceback(file.fileno(), all_threads=True)
        except TrainingError as error:
            print(f"warning: {error}", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        # The ranks began to wait at about the same time. When one ends, the launcher (torchrun,
        # srun) ends the others, so the ranks that do not report wait longer.
        time.sleep(2 + min(5.0, self._limit / 10))
        if self._rank != 0:
            time.sleep(3)
        if _is_first_to_create(self._folder / SUMMARY):
            reports = read_reports(self._folder) or [own]
            summary = str(summarize(reports, self._world_size, self._folder))
            text = f"error: {summary}"
            with suppress(TrainingError):  # it is printed too
                write_text(self._folder / SUMMARY, text + "\n", TrainingError)
            # Not a logger: the thread that hangs may hold its lock.
            print(text, file=sys.stderr, flush=True)
            self._record(step, summary)
        elif self._rank == 0:
            time.sleep(3)
        os._exit(EXIT_CODE)

    def _own_report(self, doing: str, step: int, elapsed: float) -> dict[str, Any]:
        if doing == "step" and self.clock is not None:
            doing = self.clock.phase
        frame = sys._current_frames().get(self._main)
        where, waits = locate(frame)
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "doing": doing,
            "seconds": round(elapsed, 1),
            "since": time.strftime("%FT%T", time.localtime(time.time() - elapsed)),
            "waits_for_others": waits,
            "where": where,
        }


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, as ``file:line in function``, and whether it waits for other ranks.

    Args:
        frame: Its innermost frame.
    """
    if frame is None:
        return "nowhere", False
    stack = traceback.extract_stack(frame)
    waits = any("torch/distributed/" in entry.filename for entry in stack[-4:])
    if not _is_library(stack[-1].filename):
        waits = waits or any(word in (stack[-1].line or "") for word in _WAITS)
    shown = next((e for e in reversed(stack) if not _is_library(e.filename)), stack[-1])
    return f"{'/'.join(Path(shown.filename).parts[-2:])}:{shown.lineno} in {shown.name}", waits


def _is_library(filename: str) -> bool:
    """Whether a file belongs to Python or torch, in which nearly every wait ends."""
    is_python = filename.startswith(sysconfig.get_path("stdlib")) and "-packages/" not in filename
    return is_python or "/torch/" in filename


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The first lines of all ranks' files, in the order of the ranks."""
    reports = []
    for path in sorted(folder.glob(f"{PREFIX}*.txt")):
        try:
            reports.append(json.loads(path.read_text(encoding="utf-8").partition("\n")[0]))
        except (OSError, ValueError):
            continue  # it is being written
    return reports


def summarize(reports: Sequence[dict[str, Any]], world_size: int, folder: Path) -> TrainingError:
    """Which ranks keep the others waiting, and what to do.

    Args:
        reports: Of the ranks that could write one.
        world_size: Number of processes of the run.
        folder: Where the files are.
    """
    free = [report for report in reports if not report["waits_for_others"]]
    known = {report["rank"] for report in reports}
    silent = [rank for rank in range(world_size) if rank not in known]
    words = [
        f"rank {report['rank']} on {report['host']} does not wait for others but is at "
        f"{report['where']} ({report['doing']}, step {report['step']})"
        for report in free[:4]
    ]
    if len(free) > 4:
        words.append(f"{len(free) - 4} more ranks do not wait either")
    if silent:
        shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        words.append(f"no stacks from rank {shown}, which may be frozen or dead")
    waiting = [report for report in reports if report["waits_for_others"]]
    if waiting:
        first = waiting[0]
        words.append(
            f"{len(waiting)} of {world_size} ranks wait in a collective, such as rank "
            f"{first['rank']} at {first['where']} ({first['doing']})"
        )
    step = max(report["step"] for report in reports)
    seconds = max(report["seconds"] for report in reports)
    what = f"nothing moved for {seconds:.0f} s: {'; '.join(words)}"
    remedy = (
        f"Look at the stacks in {folder}/{PREFIX}*.txt. The same command resumes from the last "
        "checkpoint; training.hang_seconds sets the limit"
    )
    return TrainingError(f"step {step}" if step else "before the first step", what, remedy)


def _is_first_to_create(path: Path) -> bool:
    """Create a file; returns False if another process already has.

    Where no file can be created, each process may be the first.
    """
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _archive_reports(folder: Path) -> None:
    """Move the reports of an earlier hang into a folder of their own."""
    found = [*folder.glob(f"{PREFIX}*.txt"), *folder.glob(SUMMARY)]
    with suppress(OSError):  # the run finds out itself that it cannot write
        place = folder / f"hang-before-{time.strftime('%Y%m%dT%H%M%S')}"
        if found:
            place.mkdir(exist_ok=True)
        for path in found:
            path.rename(place / path.name)
