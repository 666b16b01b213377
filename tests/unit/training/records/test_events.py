"""The event log of a run: what is in ``events.jsonl``, and that writing it never harms the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.runs.records import EVENTS_FILE
from megatron_chameleon.training.records.events import EventLog, read_past


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.logging.run_dir = str(tmp_path / "run")
    return config


def events(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.logging.run_dir) / EVENTS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_and_its_entries(config: Config) -> None:
    with EventLog(config, 0) as log:
        log.start(3)
        log.step = 7
        log.record("save", "saved \x1b[31m https://me:secret@host/x", extra=1, absent=None)
        log.record("alarm", "x" * 10**6, 5)
    first, save, alarm = events(config)
    assert list(first) == ["time", "event", "step", "host", "text"]
    assert first["time"].endswith("+00:00") and first["step"] == 3
    assert save["text"] == "saved \\x1b[31m https://***@host/x"
    assert save["step"] == 7 and save["extra"] == 1 and "absent" not in save
    assert alarm["step"] == 5 and len(alarm["text"]) == 4000


def test_other_ranks_write_nothing_but_a_hang(config: Config, tmp_path: Path) -> None:
    with EventLog(config, 1) as log:
        log.start(0)
        log.record("save", "x")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    log.report_hang(4, "nothing moved")
    (hang,) = events(config)
    assert (hang["event"], hang["step"], hang["text"]) == ("hang", 4, "nothing moved")


def test_restarts_are_counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventLog(config, 0) as log:
        log.start(0)
        log.record("finish", "done", 4)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with EventLog(config, 0) as log:
        log.start(4)
        log.record("save", "saved", 6)
    with EventLog(config, 0) as log:
        log.start(6)
    starts = [event for event in events(config) if event["event"].endswith("start")]
    assert [event["event"] for event in starts] == ["start", "restart", "restart"]
    assert [event.get("earlier_starts") for event in starts] == [None, 1, 2]
    assert [event.get("slurm_job") for event in starts] == [None, "77", "77"]
    assert "ended without a word" not in starts[1]["text"]
    assert starts[1]["text"].endswith("as SLURM job 77, at step 4")
    words = f"since {starts[1]['time']}, ended without a word after its last event (save at step 6)"
    assert starts[2]["text"].endswith(words)


def test_a_run_of_an_older_version_was_started_before(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "command.txt").write_text("chameleon train\n" * 3)
    with EventLog(config, 0) as log:
        log.start(1)
    (event,) = events(config)
    assert event["event"] == "restart" and event["earlier_starts"] == 3


@pytest.mark.parametrize(
    ("error", "event", "text"),
    [
        (CheckpointError("a", "b", "c"), "error", "a: b. c."),
        (RuntimeError("one\ntwo"), "error", "one two"),
        (KeyboardInterrupt(), "stop", "interrupted after step 2; steps since the last checkpoint"),
    ],
)
def test_what_ends_a_run_is_recorded(
    error: BaseException, event: str, text: str, config: Config
) -> None:
    with pytest.raises(type(error)), EventLog(config, 0) as log:
        log.start(2)
        raise error
    last = events(config)[-1]
    assert last["event"] == event and last["text"].startswith(text) and last["step"] == 2
    assert read_past(Path(config.logging.run_dir)).starts == 1


def test_a_line_that_was_cut_off(config: Config, tmp_path: Path) -> None:
    with EventLog(config, 0) as log:
        log.start(0)
    with (tmp_path / "run" / EVENTS_FILE).open("a") as file:
        file.write('{"time": "2026-11-28T21:4')
    with EventLog(config, 0) as log:
        log.start(0)
    assert [event["event"] for event in events(config)] == ["start", "restart"]


@pytest.mark.parametrize("kind", ["folder", "link", "broken"])
def test_a_file_that_cannot_be_used(
    kind: str, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is one warning, and the run goes on."""
    path = tmp_path / "run" / EVENTS_FILE
    path.parent.mkdir()
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "broken":
            path.write_bytes(b"\xff\xfe\n\n[1]\n" * 9)
    with EventLog(config, 0) as log:
        log.start(0)
        log.record("save", "saved", 1)
    assert len(caplog.records) == (0 if kind == "broken" else 1)
    if kind == "broken":
        assert len(path.read_bytes().splitlines()) == 9 * 3 + 2
    else:
        assert "an event could not be recorded" in caplog.records[0].getMessage()
    assert not (tmp_path / "elsewhere").exists()
