"""Which checkpoint a run starts from: the newest of its line, unless somebody goes back."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.state import folders
from megatron_chameleon.checkpoint.state.line import (
    LINE_FILE,
    LineRecord,
    list_line,
    read_line,
    write_line,
)
from megatron_chameleon.checkpoint.state.start import find_start
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError


def make(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"format": folders.STATE_FORMAT, "step": step, "vocab_size": 9}
    (path / folders.STATE_FILE).write_text(json.dumps(state))
    save_config(Config(), path / "config.yaml")
    return path


def make_old(folder: Path, times: dict[int, int], metrics: list[int]) -> None:
    """Checkpoints that were written at these times, and a ``metrics.jsonl`` with these steps."""
    for step, time in times.items():
        os.utime(make(folder, step) / folders.STATE_FILE, (time, time))
    lines = "".join(json.dumps({"step": step}) + "\n" for step in metrics)
    (folder.parent / "metrics.jsonl").write_text(lines)


def resumes_from(folder: Path, resume: str) -> Path | None:
    return find_start(folder, resume).checkpoint


def steps_of_line(folder: Path) -> list[int]:
    return [folders.step_of(path) for path in list_line(folder)]


def test_only_whole_checkpoints_oldest_first(tmp_path: Path) -> None:
    late, early = make(tmp_path, 200_000_000), make(tmp_path, 5)
    make(tmp_path, 7).joinpath(folders.STATE_FILE).unlink()
    make(tmp_path, 9).rename(tmp_path / ".step_00000009.saving")
    (tmp_path / "step_00000011").touch()
    assert list_line(tmp_path) == [early, late]


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert list_line(tmp_path / "none") == []
    assert resumes_from(tmp_path / "none", "auto") is None
    assert resumes_from(tmp_path / "none", "never") is None


def test_auto_takes_the_newest(tmp_path: Path) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    assert resumes_from(tmp_path, "auto") == newest


def test_a_path_is_where_the_run_begins(tmp_path: Path) -> None:
    """A job that is requeued repeats its command."""
    weights, run = make(tmp_path / "converted", 0), tmp_path / "run"
    assert resumes_from(run, str(weights)) == weights
    early, newest = make(run, 5), make(run, 10)
    assert resumes_from(run, str(weights)) == newest
    assert resumes_from(run, str(early)) == early, "going back within the run"


def test_a_path_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint: it has no state\.json"):
        resumes_from(tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder\. Give a folder"):
        resumes_from(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_a_folder_of_weights_is_where_a_run_begins(tmp_path: Path, file: str) -> None:
    weights, run = tmp_path / "weights", tmp_path / "run"
    weights.mkdir()
    (weights / file).touch()
    for weights_only in (False, True):
        start = find_start(run, str(weights), weights_only=weights_only)
        assert (start.weights, start.checkpoint, start.given) == (weights, None, str(weights))
    write_line(run, LineRecord(str(weights), "today"))
    newest = make(run, 5)
    shutil.rmtree(weights)
    again = find_start(run, str(weights), weights_only=True)
    assert (again.weights, again.checkpoint) == (None, newest), "a requeued job goes on"
    with pytest.raises(CheckpointError, match="typo: no such folder"):
        find_start(run, str(tmp_path / "typo"), weights_only=True)


@pytest.mark.parametrize("file", ["latest", "latest_universal"])
def test_a_folder_with_an_optimizer_of_another_format_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError) as caught:
        resumes_from(tmp_path / "run", str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: This is a DeepSpeed folder. --start-from {tmp_path} begins a run with its "
        f"weights. To keep the optimizer state, run `chameleon convert {tmp_path} DST --to "
        "megatron` first and resume from DST."
    )
    assert find_start(tmp_path / "run", str(tmp_path), weights_only=True).weights == tmp_path


def test_a_checkpoint_or_a_run_gives_another_run_its_weights_only(tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run" / "checkpoints"
    checkpoint = make(other / "checkpoints", 5)
    for path in (other, checkpoint):
        start = find_start(run, str(path), weights_only=True)
        assert (start.weights, start.checkpoint) == (path, None)
    with pytest.raises(CheckpointError, match=r"not one of its checkpoints\. .* --start-from /"):
        find_start(run, str(other))
    own = make(run, 5)
    with pytest.raises(CheckpointError, match=r"only another run can begin with them\. Use --resu"):
        find_start(run, str(own), weights_only=True)


def test_auto_skips_checkpoints_whose_small_files_are_damaged(tmp_path: Path) -> None:
    sound, newest = make(tmp_path, 5), make(tmp_path, 10)
    make(tmp_path, 15).joinpath(folders.STATE_FILE).unlink()
    (newest / folders.STATE_FILE).write_text("{")
    assert resumes_from(tmp_path, "auto") == sound
    (sound / folders.STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of 3 checkpoints is sound: .*is missing"):
        resumes_from(tmp_path, "auto")


def test_never_begins_a_run_and_its_restart_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    assert find_start(run, "never").given == "never"
    newest = make(run, 5)
    with pytest.raises(CheckpointError, match="already holds a run up to step_00000005"):
        find_start(run, "never")
    write_line(run, LineRecord("never", "today"))
    assert resumes_from(run, "never") == newest


def test_the_same_path_goes_on_and_another_goes_back(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    paths = {step: make(run, step) for step in (4, 8, 10)}
    start = find_start(run, str(paths[4]))
    assert start.moves is not None and start.given == "step_00000004"
    moved = (("step_00000010", "branch_0001/step_00000010"),)
    moved += (("step_00000008", "branch_0001/step_00000008"),)
    assert (start.moves.renames, start.moves.after_step) == (moved, 4)
    assert start.note == (
        "the run goes back to step_00000004: 2 checkpoints (step_00000008 to step_00000010) and "
        f"the metrics after step 4 are set aside in {run}/branch_0001; --resume "
        f"{run}/branch_0001/step_00000010 returns to them"
    )
    write_line(run, LineRecord("step_00000004", "today"))
    again = find_start(run, str(paths[4]))
    assert (again.checkpoint, again.moves) == (paths[10], None)
    assert again.note == (
        f"the run began from {paths[4]} on today and goes on from its newest checkpoint, "
        f"step_00000010; to go back to step_00000004 once more, remove {run}/{LINE_FILE} and run "
        "the same command"
    )
    other = find_start(run, str(paths[8]))
    assert other.moves is not None and len(other.moves.renames) == 1


def test_a_path_that_was_pruned_since_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    newest = make(run, 8)
    write_line(run, LineRecord("step_00000004", "today"))
    start = find_start(run, str(run / "step_00000004"))
    assert start.checkpoint == newest and start.note is not None
    assert "once more" not in start.note, "it is gone"
    with pytest.raises(CheckpointError, match="no such folder"):
        find_start(run, str(run / "step_00000002"))


@pytest.mark.parametrize("link", ["to a checkpoint", "to the run", "of a checkpoint"])
def test_a_path_through_links_is_the_same_checkpoint(tmp_path: Path, link: str) -> None:
    run = tmp_path / "run" / "checkpoints"
    early, _ = make(run, 4), make(run, 8)
    place = tmp_path / "link"
    if link == "to a checkpoint":
        place.symlink_to(early)
    elif link == "to the run":
        place.symlink_to(run.parent)
        place = place / "checkpoints" / early.name
    else:  # the checkpoint itself lies on another disk
        early.rename(tmp_path / "elsewhere")
        early.symlink_to(tmp_path / "elsewhere")
        place = early
    assert find_start(run, str(place)).given == "step_00000004"
    write_line(run, LineRecord("step_00000004", "today"))
    assert resumes_from(run, str(place)) == run / "step_00000008"


def test_where_a_run_began_may_be_gone_once_it_has_its_own(tmp_path: Path) -> None:
    weights, run = make(tmp_path / "converted", 0), tmp_path / "run"
    assert find_start(run, str(weights)).given == str(weights)
    write_line(run, LineRecord(str(weights), "today"))
    own = make(run, 5)
    with pytest.raises(CheckpointError, match="typo: no such folder"):
        find_start(run, str(tmp_path / "typo"))
    other = find_start(run, str(make(tmp_path, 7).rename(tmp_path / "other")))
    assert other.checkpoint == own and other.note is not None
    assert other.note.endswith(f"goes on from step_00000005; {tmp_path}/other is not read")
    shutil.rmtree(weights)
    assert resumes_from(run, str(weights)) == own


def test_a_damaged_checkpoint_is_not_one_of_the_run(tmp_path: Path) -> None:
    run, name = tmp_path / "run" / "checkpoints", "step_00000008.damaged"
    make(run, 5)
    make(run, 8).rename(run / name)
    with pytest.raises(CheckpointError, match="lies among the run's checkpoints, but its name is"):
        find_start(run, str(run / name))


@pytest.mark.parametrize(
    ("times", "metrics", "line", "set_aside"),
    [
        ({4: 1, 8: 2, 12: 3, 6: 4}, range(1, 8), [4, 6], [8, 12]),
        ({4: 3, 8: 1, 12: 2}, range(1, 13), [4, 8, 12], []),  # a copy has other times
        ({4: 1, 8: 2, 12: 3}, range(1, 10), [4, 8, 12], []),  # the metrics were cut
        ({4: 3, 8: 1, 12: 2}, [], [4, 8, 12], []),
    ],
)
def test_a_branch_that_an_earlier_version_abandoned(
    tmp_path: Path, times: dict[int, int], metrics: range, line: list[int], set_aside: list[int]
) -> None:
    run = tmp_path / "checkpoints"
    make_old(run, times, list(metrics))
    assert steps_of_line(run) == line
    start = find_start(run, "auto")
    assert start.checkpoint == run / f"step_{line[-1]:08d}"
    moved = [int(old[5:]) for old, _ in start.moves.renames] if start.moves else []
    assert sorted(moved) == set_aside


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "megatron_chameleon.line/9"}', '{"a": {"b": ' * 90]
    + [
        json.dumps(
            {
                **{"format": "megatron_chameleon.line/1", "given": None, "since": None},
                "pending": {
                    **{"branch": "branch_0001", "after_step": 4, "records_from": None},
                    **{"keeps_records": True, "step": 4},
                    "renames": [["step_00000008", name]],
                },
            }
        )
        for name in ("../../step_00000008", "/etc/step_00000008", "branch_0001/..", "")
    ],
)
def test_a_line_file_that_does_not_say_where_the_run_stands(tmp_path: Path, content: str) -> None:
    make(tmp_path, 4)
    (tmp_path / LINE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"line\.json: .* Remove it; the run then goes on"):
        read_line(tmp_path)
