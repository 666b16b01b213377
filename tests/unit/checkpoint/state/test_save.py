"""Only whole checkpoints are found, and those that do not fit are refused."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.state import folders, resume, save
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import CheckpointConfig, Config
from megatron_chameleon.errors import CheckpointError


def make(folder: Path, step: int, config: Config | None = None) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"format": folders.STATE_FORMAT, "step": step, "vocab_size": 9}
    state["tokenizer_fingerprint"] = "abc"
    (path / folders.STATE_FILE).write_text(json.dumps(state))
    save_config(config or Config(), path / "config.yaml")
    return path


def test_only_whole_checkpoints_oldest_first(tmp_path: Path) -> None:
    late, early = make(tmp_path, 200_000_000), make(tmp_path, 5)
    make(tmp_path, 7).joinpath(folders.STATE_FILE).unlink()
    make(tmp_path, 9).rename(tmp_path / ".step_00000009.saving")
    (tmp_path / "step_00000011").touch()
    assert folders.list_checkpoints(tmp_path) == [early, late]


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert folders.list_checkpoints(tmp_path / "none") == []
    assert resume.find_resume(tmp_path / "none", "auto") is None
    assert resume.find_resume(tmp_path / "none", "never") is None


def test_auto_takes_the_newest(tmp_path: Path) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    assert resume.find_resume(tmp_path, "auto") == newest


def test_a_path_is_where_the_run_begins(tmp_path: Path) -> None:
    """A job that is requeued repeats its command."""
    weights, run = make(tmp_path / "converted", 0), tmp_path / "run"
    assert resume.find_resume(run, str(weights)) == weights
    early, newest = make(run, 5), make(run, 10)
    assert resume.find_resume(run, str(weights)) == newest
    assert resume.find_resume(run, str(early)) == early, "going back within the run"


def test_a_path_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint: it has no state\.json"):
        resume.find_resume(tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nowhere: There is no such folder\. Give a folder"):
        resume.find_resume(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("config.json", "Hugging Face"),
        ("params.json", "Meta"),
        ("latest", "DeepSpeed"),
        ("latest_universal", "DeepSpeed"),
    ],
)
def test_a_folder_of_another_format_is_named(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError) as caught:
        resume.find_resume(tmp_path / "run", str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: This is a {name} folder. Run `chameleon convert {tmp_path} DST --to "
        "megatron` first."
    )


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "other/1"}'])
def test_a_damaged_state_is_refused(tmp_path: Path, content: str) -> None:
    path = make(tmp_path, 5)
    (path / folders.STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        folders.load_state(path)


def test_what_must_not_change_between_save_and_resume(tmp_path: Path) -> None:
    path, config = make(tmp_path, 5), Config()
    resume.check_fits(path, config, "abc")
    config.model.num_layers, config.training.seed = 9, 3
    config.optimizer.lr = 0.5  # may change
    with pytest.raises(CheckpointError) as caught:
        resume.check_fits(path, config, "other")
    assert str(caught.value) == (
        f"{path}: The checkpoint has model.num_layers=4 (your config: 9), training.seed=1 (your "
        "config: 3), a different tokenizer. Set them in your config, or train into another "
        "logging.run_dir."
    )
    config = Config()
    config.model.qk_norm_groups = 1
    with pytest.raises(CheckpointError) as caught:
        resume.check_fits(path, config, "abc")
    assert str(caught.value) == (
        f"{path}: The checkpoint has model.qk_norm_groups=null (your config: 1). Set it in your "
        "config, or train into another logging.run_dir."
    )


def test_a_checkpoint_beyond_the_last_step(tmp_path: Path) -> None:
    path, config = make(tmp_path, 500), Config()
    with pytest.raises(CheckpointError, match=r"at step 500, beyond training\.steps 100"):
        resume.check_fits(path, config, "abc")


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    save.delete(make(tmp_path, 5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "deleted"),
    [
        (2, 0, [5, 10, 15]),
        (1, 0, [5, 10, 15, 20]),
        (2, 10, [5, 15]),
        (1, 100, [5, 10, 15, 20]),
        (9, 0, []),
    ],
)
def test_what_is_deleted(
    tmp_path: Path, keep_last: int, keep_every: int, deleted: list[int]
) -> None:
    paths = [tmp_path / f"step_{step:08d}" for step in (5, 10, 15, 20, 25)]
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    found = save.disposable(paths, config)
    assert [int(path.name[5:]) for path in found] == deleted


def test_auto_skips_checkpoints_whose_small_files_are_damaged(tmp_path: Path) -> None:
    sound, newest = make(tmp_path, 5), make(tmp_path, 10)
    make(tmp_path, 15).joinpath(folders.STATE_FILE).unlink()
    (newest / folders.STATE_FILE).write_text("{")
    assert resume.find_resume(tmp_path, "auto") == sound
    (sound / folders.STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of 3 checkpoints is sound: .*is missing"):
        resume.find_resume(tmp_path, "auto")
