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


@pytest.mark.parametrize(
    ("losses", "deleted"),
    [
        ({5: 3.0, 10: 2.0, 15: 2.5, 20: 2.6, 25: 2.7}, [5, 15, 20]),
        ({5: 3.0, 10: 2.0, 15: 2.0}, [5, 15, 20]),  # of equal ones the first
        ({25: 1.0, 5: 3.0}, [5, 10, 15, 20]),  # the newest is kept anyway
        ({}, [5, 10, 15, 20]),
        ({5: None, 10: "2", 15: True, 20: 4.0, 25: float("nan")}, [5, 10, 15]),
    ],
)
def test_the_best_checkpoint_is_kept(
    tmp_path: Path, losses: dict[int, object], deleted: list[int]
) -> None:
    paths = [make(tmp_path, step) for step in (5, 10, 15, 20, 25)]
    for step, path in zip((5, 10, 15, 20, 25), paths, strict=True):
        state = json.loads((path / "state.json").read_text())
        if step in losses:
            state[save.VALIDATION_LOSS] = losses[step]
        (path / "state.json").write_text(json.dumps(state))
    (paths[2] / "config.yaml").unlink()  # not read
    config = CheckpointConfig(keep_last=1, keep_best=True)
    assert [int(path.name[5:]) for path in save.disposable(paths, config)] == deleted


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (5, 10, 15)]
    (paths[0] / "state.json").write_text("{")
    config = CheckpointConfig(keep_last=1, keep_best=True)
    assert save.disposable(paths, config) == paths[:2]
