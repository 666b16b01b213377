"""How a run stands: from any run folder, whatever is missing, damaged or being written."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.holder import LOCK_FILE, this_machine
from megatron_chameleon.runs.status import RunStatus, StatusReader, find_runs
from megatron_chameleon.runs.status_screen import status_line, status_screen

STATE = '{"format": "megatron_chameleon.checkpoint/1", "step": 20}'


def make_run(folder: Path, steps: int = 30, **options: Any) -> Path:
    """A run of 40 steps; options: events, lock, held_out and metrics (more lines)."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("training: {steps: 40}\nmodel: {seq_length: 8}\n")
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 4.0 - step / 100, "loss_text": 3.5, "loss_image": None}
        record |= {"tokens_per_second": 1e4, "step_seconds": 0.5, "mfu": 0.4}
        if options.get("held_out") and step % 10 == 0:
            record |= {"validation/loss": abs(step - 20) / 10 + 3, "validation/loss_text": 2.5}
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + options.get("metrics", ""))
    if "lock" in options:
        values = {"host": "node1", "pid": 7, "since": "2026-11-28 10:00:00", "machine": "other"}
        lock = {**values, "heartbeat_seconds": 30, **options["lock"]}
        (folder / LOCK_FILE).write_text(json.dumps(lock))
    if "events" in options:
        text = ""
        for kind in options["events"]:
            event = {"time": "2026-11-28T10:00:00+00:00", "event": kind, "step": 5, "host": "node1"}
            text += json.dumps({**event, "text": f"the {kind}"}) + "\n"
        (folder / "events.jsonl").write_text(text)
    checkpoint = folder / "checkpoints" / "step_00000020"
    if steps >= 20:
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(STATE)
    return folder


def read(run: Path) -> RunStatus:
    return StatusReader().read(run)


def test_a_run_that_lives(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r",
        lock={"slurm_job": "12"},
        events=["start", "stop", "restart", "alarm"],
        held_out=True,
        metrics='{"step": 31, "lo',
    )
    (run / "alarms.jsonl").write_text('{"step": 5}\n')
    status = read(run)
    assert (status.state, status.host, status.pid, status.slurm_job) == (
        "running",
        "node1",
        7,
        "12",
    )
    assert (status.step, status.steps, status.eta_seconds) == (30, 40, 5.0)
    assert status.loss == {"all": 3.7, "text": 3.5, "image": None}
    assert status.held_out == {
        "step": 30, "all": 4.0, "text": 2.5, "image": None, "lowest": 3.0, "lowest_step": 20
    }  # fmt: skip
    assert (status.alarms, status.last_alarm, status.starts) == (1, "the alarm", 2)
    assert status.checkpoint is not None and status.checkpoint["step"] == 20
    assert status.problems == [] and not status.is_stalled
    screen = status_screen(status, 100)
    for words in (
        "r: running (on node1, pid 7, SLURM job 12, since 2026-11-28 10:00:00)",
        "step        30 of 40 (75%), 5s left",
        "loss        3.7000 (text 3.5000, image -)",
        "held out    4.0000 (text 2.5000, image -) at step 30; the lowest was 3.0000 at step 20",
        "speed       10,000 tokens/s, MFU 40.0%, 0.5 s per step",
        "checkpoint  step 20, 0s ago; 1 checkpoint kept",
        "alarms      1; the last: the alarm",
        "restarts    1",
    ):
        assert words in screen
    assert "running, 30 of 40 (75%), 5s left, loss 3.7000 (" in status_line(status)
    assert json.loads(json.dumps(status.to_json(), allow_nan=False))["step"] == 30


@pytest.mark.parametrize(
    ("events", "lock", "steps", "state"),
    [
        (["start", "finish"], {"ended": "x"}, 40, "finished"),
        (["start", "stop"], {"ended": "x"}, 30, "stopped"),
        (["start", "error"], {"ended": "x"}, 30, "failed"),
        (["start", "hang"], {"ended": "x"}, 30, "hung"),
        (["start", "save"], {"ended": "x"}, 30, "died"),
        (["start", "finish", "restart"], {}, 30, "running"),
        (["start", "finish"], {}, 30, "running"),
        (None, {"ended": "x"}, 30, "ended"),
        (None, {"ended": "x"}, 40, "finished"),
        (None, {"ended": "x"}, 0, "new"),
        (None, None, 30, "unknown"),  # of a very early version, or copied without its lock
        (None, None, 40, "finished"),
        (["start", "save"], None, 30, "silent"),
        (["start", "stop"], None, 30, "stopped"),
    ],
)
def test_what_it_is_doing(
    events: list[str] | None, lock: dict[str, Any] | None, steps: int, state: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if lock is None else {"lock": lock}
    if events is not None:
        options["events"] = events
    status = read(make_run(tmp_path / "r", steps, **options))
    assert status.state == state
    assert status_screen(status, 80).startswith("r: ")


def test_a_run_whose_machine_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", lock={}, events=["start", "save"])
    os.utime(run / LOCK_FILE, (time.time() - 3600,) * 2)
    os.utime(run / "metrics.jsonl", (time.time() - 3600,) * 2)
    assert read(run).state == "died"
    (run / "events.jsonl").unlink()
    assert read(run).state == "ended"


def test_a_run_that_does_not_move(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", lock={}, events=["start"])
    os.utime(run / "metrics.jsonl", (time.time() - 600,) * 2)
    status = read(run)
    assert (status.state, status.is_stalled) == ("running", True)
    assert "10m00s ago, where a step takes 0.5 s: it is saving or sampling, or it" in status_screen(
        status, 100
    )
    assert "no step for 10m00s" in status_line(status)


def test_what_grows_is_read_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", held_out=True)
    reader = StatusReader()
    assert reader.read(run).held_out["lowest_step"] == 20
    path = run / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 31, "validation/loss": 1.5')
        file.flush()
        assert reader.read(run).held_out["step"] == 30
        file.write('}\n{"step": 32, "validation/loss": "x"}\n')
    assert reader.read(run).held_out == {
        "step": 31, "all": 1.5, "text": None, "image": None, "lowest": 1.5, "lowest_step": 31
    }  # fmt: skip
    kept = "".join(path.read_text().splitlines(keepends=True)[:10])
    path.with_suffix(".new").write_text(kept)
    path.with_suffix(".new").replace(path)  # as a run does that goes back
    assert reader.read(run).held_out["lowest_step"] == 10
    path.write_text('{"step": 4, "validation/loss": 9.5}\n')  # as an editor may write it
    assert reader.read(run).held_out["lowest_step"] == 4


DAMAGES: dict[str, tuple[str, bytes | None]] = {
    "no metrics": ("metrics.jsonl", None),
    "empty metrics": ("metrics.jsonl", b""),
    "one cut line": ("metrics.jsonl", b'{"step": 1, "loss": 2'),
    "binary metrics": ("metrics.jsonl", bytes(range(256)) * 99),
    "no lines": ("metrics.jsonl", b"x" * 9_000_000),
    "wrong types": (
        "metrics.jsonl",
        b'{"step": 9, "loss": "x", "mfu": [1], "step_seconds": -1, "tokens_per_second": true,'
        b'"consumed_tokens": 1.5, "validation/loss": {}, "grad_norm": 1e999}\n',
    ),
    "huge": ("metrics.jsonl", b'{"step": 9, "loss": 1e308, "loss_text": -1e299}\n'),
    "no config": ("config.yaml", None),
    "no yaml": ("config.yaml", b"a: [1,\n"),
    "steps in words": ("config.yaml", b"training: {steps: many}\n"),
    "no mapping": ("config.yaml", b"- 1\n"),
    "binary config": ("config.yaml", b"\xff\x00\x01"),
    "no events": ("events.jsonl", b"[]\n7\n{}\n"),
    "control characters": (
        "events.jsonl",
        b'{"event": "\\u001b[31m", "text": "\\u001b]0;x\\u0007\\n", "host": 5, "time": []}\n',
    ),
    "no alarms": ("alarms.jsonl", b"{}\n\xff\n"),
    "odd lock": ("run.lock", b'{"host": 5, "pid": "x", "since": [1], "slurm_job": {}}'),
    "odd state": ("checkpoints/step_00000020/state.json", b"[]"),
    "no state": ("checkpoints/step_00000020/state.json", None),
    "odd line": ("checkpoints/line.json", b"{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("width", [10, 60, 200])
def test_any_damage_is_a_note_at_most(damage: str, width: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r\u00e9", lock={}, events=["start", "save"], held_out=True)
    name, content = DAMAGES[damage]
    path = run / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    status = read(run)
    assert ("config.yaml is missing" in status.problems) == (damage == "no config")
    json.dumps(status.to_json(), allow_nan=False)
    screen = status_screen(status, width)
    assert all(len(line) <= max(40, width) for line in screen.splitlines())
    assert screen.isprintable() or "\x1b" not in screen
    assert "\n" not in status_line(status) and status_line(status).isprintable()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before, "it only reads"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "events.jsonl", "run.lock"])
def test_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", lock={}, events=["start"])
    (run / name).unlink()
    (run / name).mkdir()
    status = read(run)
    assert status_screen(status, 60)


def test_folders_of_runs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "b" / "one"), make_run(tmp_path / "a")
    three = make_run(tmp_path / "b" / "three", steps=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert find_runs([str(tmp_path)]) == [two, one, three]
    assert find_runs([str(one), str(one / "metrics.jsonl"), str(tmp_path)]) == [one, two, three]
    assert find_runs([str(one / "checkpoints" / "step_00000020")]) == [one]
    for path in (tmp_path / "other", tmp_path / "file", tmp_path / "none", "\0", ""):
        with pytest.raises(DataError):
            find_runs([str(path)])


def test_the_machine_has_a_name() -> None:
    assert this_machine() and this_machine() == this_machine()
