"""A run of two processes in which rank 1 is slow at first, and hangs in the end."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from places import PROGRAMS
from run_command import TIMEOUT_SECONDS, environment

pytestmark = pytest.mark.serial  # it times ranks, and 4 s count as a hang

SCRIPT = PROGRAMS / "train_with_stall.py"


@dataclass(frozen=True)
class Ended:
    folder: Path
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def run(tiny) -> Ended:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folder = tiny.folder / "stall"
    overrides = ["training.hang_seconds=4", "logging.every_steps=2", "checkpoint.every_steps=4"]
    result = subprocess.run(
        [sys.executable, *torchrun, SCRIPT, tiny.config, f"logging.run_dir={folder}", *overrides],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
    )
    return Ended(folder, result.returncode, result.stdout, result.stderr)


def test_the_slow_rank_is_named_once(run: Ended) -> None:
    warnings = [line for line in run.stdout.splitlines() if "is slow" in line]
    (warning,) = warnings
    assert warning.startswith("warning: step 2: rank 1 (")
    assert "is slow: over 2 steps it took " in warning
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["slowest_rank" in line for line in lines] == [False, True, False, True, False]
    for line in (lines[1], lines[3]):
        assert line["slowest_rank"] == 1
        # Two micro-batches per step; rank 0 does not count its wait for rank 1.
        assert line["rank_seconds_max"] - line["rank_seconds_min"] > 0.4
        assert line["step_seconds"] > line["rank_seconds_max"]
        assert line["rank_seconds_min"] <= line["rank_seconds_median"]
        assert line["data_seconds_max"] >= 0


def test_the_hang_ends_the_job_with_all_stacks(run: Ended) -> None:
    assert run.returncode == 1  # torchrun's own code for workers that failed
    assert "exitcode  : 124" in run.stderr
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: step 6: nothing moved for ")
    assert "; 1 of 2 ranks wait in a collective, such as rank 0 at distributed/" in error
    assert " does not wait for others but is at programs/train_with_stall.py:" in error
    assert " in stuck_in_the_model (forward and backward, step 6); " in error
    assert f"Look at the stacks in {run.folder}/logs/hang-rank*.txt. The same command" in error
    assert (run.folder / "logs" / "hang.txt").read_text() == error + "\n"
    for rank, phase, waits in ((0, "gradient reduction and update", True), (1, None, False)):
        text = (run.folder / "logs" / f"hang-rank{rank:05d}.txt").read_text()
        header = json.loads(text.partition("\n")[0])
        assert (header["rank"], header["step"], header["waits_for_others"]) == (rank, 6, waits)
        assert header["doing"] == (phase or "forward and backward")
        assert header["seconds"] >= 4
        assert "most recent call first" in text
        assert "read-ahead" in text or "threading.py" in text, "the other threads are missing"
        assert ("in stuck_in_the_model" in text) == (rank == 1)
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "straggler", "save", "hang"]
    assert f"error: {events[-1]['text']}" == error
    saved = [path.name for path in (run.folder / "checkpoints").iterdir()]
    assert saved == ["step_00000004"]
