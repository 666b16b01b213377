"""Going back sets a branch aside; killed anywhere, the same command then does the right thing.

Checkpoints are small files here, and ``Story`` plays a run that starts, saves, prunes and is
killed, with what the real one calls in between.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.checkpoint.state import folders
from megatron_chameleon.checkpoint.state.line import LINE_FILE, list_branches, list_line, read_line
from megatron_chameleon.checkpoint.state.save import disposable
from megatron_chameleon.checkpoint.state.start import Start, find_start
from megatron_chameleon.config.schema import CheckpointConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.training.run.branches import carry_out, finish_moves


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process was killed."""


class Story:
    """A run folder and what is known about it.

    Each save has a name of its own, which the checkpoint's files and the metrics of its steps tell,
    so a line can be told from another.
    """

    def __init__(self, run: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
        self.process = 0

    def start(self, resume: str) -> Start:
        """What ``refresh_inputs`` and ``RunFolder`` do on rank 0."""
        finish_moves(self.folder)
        start = find_start(self.folder, resume)
        carry_out(self.folder, start)
        checkpoint = start.checkpoint_after_moves
        self.step = folders.load_state(checkpoint)["step"] if checkpoint else 0
        self.process += 1
        kept = [line for line in self.metrics() if line["step"] <= self.step]
        self._write("metrics.jsonl", kept)
        return start

    def train(self, steps: int, every: int) -> None:
        for _ in range(steps):
            self.step += 1
            line = {"step": self.step, "process": self.process}
            self._write("metrics.jsonl", [*self.metrics(), line])
            if self.step % every == 0:
                self.save()

    def save(self) -> None:
        path = self.folder / folders.step_folder(self.step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        state = {"format": folders.STATE_FORMAT, "step": self.step, "vocab_size": 9}
        (path / "config.yaml").write_text("{}")
        (path / folders.STATE_FILE).write_text(json.dumps({**state, "lines": self.metrics()}))
        for old in disposable(list_line(self.folder), self.config):
            shutil.rmtree(old)
        assert path.is_dir(), "what was just saved was pruned"

    def metrics(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        path = self.run / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[int]:
        return [folders.step_of(path) for path in list_line(self.folder)]

    def path(self, step: int, branch: int | None = None) -> str:
        parts = [] if branch is None else [f"branch_{branch:04d}"]
        return str(self.folder.joinpath(*parts, folders.step_folder(step)))

    def check(self) -> None:
        """The metrics have each step once, and the newest checkpoint is their line's."""
        lines = self.metrics()
        assert [line["step"] for line in lines] == list(range(1, self.step + 1))
        newest = list_line(self.folder)[-1]
        state = folders.load_state(newest)
        assert state["lines"] == lines[: state["step"]], "the checkpoint is of another branch"

    def _write(self, name: str, lines: list[dict[str, Any]]) -> None:
        (self.run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A run with the checkpoints 4, 8, 10 and 12."""
    story = Story(tmp_path / "run", keep_last=4)
    story.start("auto")
    story.train(4, every=4)
    story.train(4, every=4)
    story.train(4, every=2)
    assert story.steps() == [4, 8, 10, 12]
    return story


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("keep_every", [0, 4])
@pytest.mark.parametrize("restart", ["auto", "the same path"])
def test_what_is_saved_after_going_back_stays(
    story: Story, keep_last: int, keep_every: int, restart: str
) -> None:
    story.config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    before = story.metrics()
    story.start(story.path(4))
    story.train(2, every=2)
    assert story.steps()[-1] == 6
    story.check()
    for step in (8, 10, 12):
        assert Path(story.path(step, branch=1), folders.STATE_FILE).is_file()
    assert story.metrics("checkpoints/branch_0001/metrics.jsonl") == before
    story.train(1, every=2)  # and is killed
    story.start(story.path(4) if restart == "the same path" else "auto")
    assert story.step == 6
    story.train(2, every=2)
    story.check()
    assert len(list_branches(story.folder)) == 1


def test_another_path_and_a_removed_note_go_back_again(story: Story) -> None:
    story.start(story.path(4))
    story.train(6, every=2)
    story.start(story.path(8))
    assert (story.step, story.steps()) == (8, [4, 6, 8])
    story.train(2, every=2)
    story.start(story.path(4))
    assert (story.step, story.steps()) == (4, [4])
    story.train(2, every=2)
    (story.folder / LINE_FILE).unlink()
    story.start(story.path(4))
    assert (story.step, story.steps()) == (4, [4])
    names = [path.name for path in list_branches(story.folder)]
    assert names == ["branch_0001", "branch_0002", "branch_0003", "branch_0004"]


def test_an_abandoned_branch_comes_back(story: Story) -> None:
    samples = story.run / "samples"
    for step in (4, 8, 12):
        (samples / folders.step_folder(step)).mkdir(parents=True)
        (samples / folders.step_folder(step) / "samples.jsonl").write_text("{}\n")
    (samples / "index.html").touch()
    (story.run / "wandb_id.txt").write_text("first\n")
    (story.run / "nonfinite.jsonl").write_text('{"step": 3}\n{"step": 9}\n{"step": 1')
    (story.run / "events.jsonl").write_text('{"step": 4}\n{"step": 10}\n{"step": 12}\n')
    before = story.metrics()
    story.start(story.path(4))
    assert sorted(path.name for path in samples.iterdir()) == ["step_00000004"]
    assert not (story.run / "wandb_id.txt").exists()
    assert (story.run / "nonfinite.jsonl").read_text() == '{"step": 3}\n'
    assert (story.run / "events.jsonl").read_text() == '{"step": 4}\n'
    (story.run / "wandb_id.txt").write_text("second\n")
    story.train(4, every=2)
    story.start(story.path(10, branch=1))
    assert (story.step, story.steps(), story.metrics()) == (10, [4, 8, 10], before[:10])
    assert sorted(path.name for path in samples.iterdir()) == ["step_00000004", "step_00000008"]
    assert (story.run / "wandb_id.txt").read_text() == "first\n"
    assert (story.run / "nonfinite.jsonl").read_text() == '{"step": 3}\n{"step": 9}\n'
    assert (story.run / "events.jsonl").read_text() == '{"step": 4}\n{"step": 10}\n'
    assert Path(story.path(12, branch=1)).is_dir() and Path(story.path(8, branch=2)).is_dir()
    story.train(2, every=2)
    assert story.steps() == [4, 8, 10, 12]
    start = story.start(story.path(10, branch=1))  # a requeued job
    assert (story.step, start.moves) == (12, None)
    story.check()


def test_a_run_that_was_moved_goes_on(story: Story) -> None:
    story.start(story.path(4))
    story.train(2, every=2)
    moved = Story(story.run.rename(story.run.with_name("moved")), keep_last=4)
    start = moved.start(moved.path(4))
    assert (moved.step, start.moves) == (6, None)
    moved.start(moved.path(12, branch=1))
    moved.check()


def test_a_relative_link_keeps_its_target(story: Story, tmp_path: Path) -> None:
    place = Path(story.path(8))
    place.rename(tmp_path / "archive")
    place.symlink_to(Path("../../archive"))
    story.start(story.path(4))
    assert folders.load_state(Path(story.path(8, branch=1)))["step"] == 8


def test_a_link_in_the_way_is_not_followed(story: Story, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    (story.folder / ".branch_0001.partial").symlink_to(other)
    with pytest.raises(
        CheckpointError, match="is a link, and the program puts its own files there"
    ):
        story.start(story.path(4))
    assert (other / "precious").is_file() and story.steps() == [4, 8, 10, 12]


def test_a_full_disk_changes_nothing(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(story.run.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", refuse)
        with pytest.raises(CheckpointError, match=r"branch_0001\S+: cannot be written \(No space"):
            story.start(story.path(4))
    assert sorted(story.run.rglob("*")) == before
    story.start(story.path(4))
    assert story.steps() == [4]


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch, story: Story, resume: str) -> bool:
    """Start a run that is killed before its n-th change of the disk; False if it was not."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return original(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "symlink_to"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        for name in ("copy2", "rmtree"):
            patch.setattr(shutil, name, counted(getattr(shutil, name)))
        try:
            story.start(resume)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("restart", ["auto", "the same path"])
def test_killed_at_each_change_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: str
) -> None:
    moment, is_killed = 0, True
    while is_killed:
        story = Story(tmp_path / f"run{moment}", keep_last=4)
        story.start("auto")
        story.train(8, every=4)
        (story.run / "samples" / "step_00000008").mkdir(parents=True)
        (story.run / "samples" / "step_00000008" / "a.png").touch()
        is_killed = killed_at(moment, monkeypatch, story, story.path(4))
        begun = read_line(story.folder).given == "step_00000004"
        assert begun or story.steps() == [4, 8], "nothing moves before the note is written"
        story.start("auto" if restart == "auto" and begun else story.path(4))
        assert (story.step, story.steps()) == (4, [4])
        story.train(2, every=2)
        story.check()
        # And back again, killed at the same moment.
        branch = next(b for b in list_branches(story.folder) if any(b.glob("step_*")))
        back = str(branch / "step_00000008")
        killed_at(moment, monkeypatch, story, back)
        begun = read_line(story.folder).given == f"{branch.name}/step_00000008"
        story.start("auto" if restart == "auto" and begun else back)
        assert (story.step, story.steps()) == (8, [4, 8])
        assert (story.run / "samples" / "step_00000008" / "a.png").is_file()
        story.train(1, every=1)
        story.check()
        moment += 1
    assert moment > 6


@pytest.mark.parametrize("seed", range(8))
def test_any_story_of_saves_kills_and_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """No start loses what was saved: each checkpoint is on the line, set aside, or was pruned."""
    chance = random.Random(seed)
    story = Story(tmp_path / "run", chance.choice([1, 2, 3]), chance.choice([0, 4]))
    resume = "auto"
    story.start(resume)
    for _ in range(30):
        story.train(chance.randint(1, 5), every=chance.choice([1, 2, 3]))
        if not story.steps():
            continue
        story.check()
        before = {p.relative_to(story.folder) for p in story.folder.glob("**/step_*")}
        newest = folders.load_state(list_line(story.folder)[-1])["lines"]
        places = sorted(story.folder.glob("**/step_*"))
        want = chance.choice(["auto", "same", "back"])
        resume = {"auto": "auto", "same": resume, "back": str(chance.choice(places))}[want]
        expects = None
        if want == "back" and Path(resume).is_dir():
            expects = folders.load_state(Path(resume))["lines"]
            given = Path(resume).relative_to(story.folder).as_posix()
            if given == read_line(story.folder).given:
                expects = newest
        while killed_at(chance.randint(0, 12), monkeypatch, story, resume):
            pass
        if expects is not None:
            assert story.metrics() == expects[: story.step]
        elif want != "back":
            assert story.metrics() == newest, "a restart goes on from the newest that was written"
        found = {p.name for p in story.folder.glob("**/step_*")}
        assert {path.name for path in before} <= found, "a checkpoint is missing"
        assert len(list(story.folder.glob("**/step_*"))) == len(before)
