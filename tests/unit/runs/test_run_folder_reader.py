"""Run folders of all versions, and what crashes and clumsy hands leave of them."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.answers.samples import list_samples, read_samples
from megatron_chameleon.runs.records import MOST_EVENTS, defaults
from megatron_chameleon.runs.run import find_run, read_run
from places import REPOSITORY


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of today."""
    folder = tmp_path / "läuft <b>"
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "weights").write_bytes(bytes(1000))
    (folder / "checkpoints" / "step_00000006").mkdir()
    branch = folder / "checkpoints" / "branch_0001"
    (branch / "step_00000005").mkdir(parents=True)
    (branch / "branch.json").write_text('{"after_step": 4, "since": "2026-01-02 03:04:05"}')
    (branch / "metrics.jsonl").write_text('{"step": 5}\n{"step": 7}\n')
    (folder / "config.yaml").write_text(
        "training: {steps: 8}\nfuture: {key: [1, {deep: x}]}\ndata: {stage1: []}\n"
    )
    (folder / "environment.json").write_text('{"host": "h"}')
    (folder / "command.txt").write_text("train a\n\ntrain b\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "alarms.jsonl").write_text('{"step": 1, "output_norm": 5}\n')
    return folder


def test_a_whole_run(run: Path) -> None:
    event = {"time": "2026-01-02T03:04:05+02:00", "event": "start", "step": 0, "new": [1]}
    lines = [json.dumps(event), "broken", '{"event": 5, "time": 7, "step": "x"}', '{"cut']
    (run / "events.jsonl").write_text("\n".join(lines))
    found = read_run(run)
    assert found.name == "läuft <b>" and found.metrics.last("loss") == 2.0
    assert found.config.changed() == {
        "training.steps": (100, 8),
        "future.key[0]": (None, 1),
        "future.key[1].deep": (None, "x"),
    }
    assert found.config.get("training.seed") == 1 and found.planned_steps == 8
    assert found.commands == ["train a", "train b"] and found.environment == {"host": "h"}
    start, odd = found.events.events
    assert start.time == datetime.datetime(2026, 1, 2, 1, 4, 5, tzinfo=datetime.UTC)
    assert (start.kind, start.step, start.values["new"]) == ("start", 0, [1])
    assert (odd.kind, odd.step, odd.time) == ("5", None, None)
    assert [(c.step, c.is_whole) for c in found.checkpoints] == [(4, True), (6, False)]
    assert found.checkpoints[0].size_bytes() == 1002 and found.checkpoints[0].state() == {}
    (branch,) = found.branches
    assert (branch.name, branch.after_step, branch.last_step) == ("branch_0001", 4, 7)
    assert [alarm["output_norm"] for alarm in found.alarms.alarms] == [5]
    (problem,) = found.problems
    assert problem.startswith("1 line of events.jsonl was left out; the first is line 2, which is")


def test_a_run_of_an_earlier_version_lacks_files_without_a_word(run: Path) -> None:
    (run / "alarms.jsonl").unlink()
    found = read_run(run)
    assert (found.problems, found.events.events, found.alarms.alarms) == ([], [], [])


@pytest.mark.parametrize("kind", ["missing", "garbage", "folder", "fifo", "loop"])
@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "config.yaml", "environment.json", "command.txt"),
        *("checkpoints/line.json", "events.jsonl", "alarms.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(run: Path, name: str, kind: str) -> None:
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "garbage":
        path.write_bytes(b"\x00\xff[{: &a *a !!python/object:os.system \n" * 3)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    found = read_run(run)
    optional = ("checkpoints/line.json", "events.jsonl", "alarms.jsonl")
    silent = (kind == "missing" and name in optional) or name + kind == "command.txtgarbage"
    if kind == "loop" and name in optional:
        silent = True  # a link to nowhere is no file
    assert len(found.problems) == (0 if silent else 1), found.problems
    assert silent or Path(name).name in found.problems[0]
    assert [c.step for c in found.checkpoints] == [4, 6]


def test_of_many_events_the_newest_are_kept(run: Path) -> None:
    lines = (f'{{"event": "alarm", "step": {i}}}\n' for i in range(MOST_EVENTS + 7))
    (run / "events.jsonl").write_text("".join(lines))
    log = read_run(run).events
    assert (len(log.events), log.left_out, log.events[0].step) == (MOST_EVENTS, 7, 7)


def test_a_run_is_found_by_what_lies_in_it(run: Path) -> None:
    inside = ("", "metrics.jsonl", "checkpoints", "checkpoints/step_00000004")
    (run / "checkpoints" / "step_00000004" / "config.yaml").write_text("{}")
    for name in (*inside, "checkpoints/branch_0001/step_00000005"):
        assert find_run(run / name).resolve() == run.resolve()
    branch = run / "checkpoints" / "branch_0001"  # it has metrics of its own
    assert find_run(branch) == branch and read_run(branch).metrics.last_step == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such run folder. Check the path"),
        ("file.txt", "is a file, not a run folder. Give a run folder"),
        ("empty", r"is not a run folder: it has none of metrics.jsonl, config.yaml, .* Give the"),
        ("x" * 5000, "cannot be read .File name too long|no such run folder"),
        ("a\0b", "no such run folder|cannot be read .embedded null byte"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(DataError, match=message):
        read_run(tmp_path / name)


def test_samples_stay_within_the_folder_of_their_step(run: Path, tmp_path: Path) -> None:
    folder = run / "samples" / "step_00000004"
    folder.mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "a.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["a.png", "../../../secret.png", str(tmp_path / "secret.png"), "link.png", "b\0"]
    parts = [{"type": "image", "image": name} for name in names]
    prompt = {"text": "Draw", "image": "/x/y.png", "force": "image"}
    lines = [
        {
            "prompt": prompt,
            "content": [{"type": "text", "text": "<b>"}, *parts, 5, {"type": "text"}],
        },
        {"prompt": None, "content": "x"},
        {"content": [{"type": "image"}]},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines) + "broken\n"
    (folder / "samples.jsonl").write_text(content)
    (run / "samples" / "step_00000009").mkdir()
    problems: list[str] = []
    assert list_samples(run) == [folder]
    first, *others = read_samples(folder, problems)
    assert first.prompt == "y.png Draw (image)" and first.parts[0].text == "<b>"
    images = [part.image for part in first.parts[1:]]
    assert images == [(folder / "a.png").resolve(), None, None, None, None]
    assert [answer.parts for answer in others] == [[], []]
    assert len(problems) == 1 and problems[0].startswith("step_00000004: 1 line of samples.jsonl")


def test_the_defaults_are_flat() -> None:
    assert defaults()["training.steps"] == 100 and defaults()["data.stage1"] == []


def test_reading_a_run_does_not_import_torch(run: Path) -> None:
    code = (
        "import sys; from megatron_chameleon.runs.run import read_run; read_run(sys.argv[1]);"
        "assert not {'torch', 'matplotlib', 'pandas', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], cwd=REPOSITORY, check=True)
