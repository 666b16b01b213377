"""The steps whose update is left out: configured, found, and remembered."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.state.folders import STATE_FORMAT
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError, DataError
from megatron_chameleon.training.run.skipped_steps import count_updates, find_skipped_steps


def make(folder: Path, step: int, told: list[int] | None = None, **state: object) -> Config:
    """Write a checkpoint to the folder; returns the config of its run."""
    values = {"format": STATE_FORMAT, "step": step, "vocab_size": 1, **state}
    (folder / "state.json").write_text(json.dumps(values))
    config = Config()
    config.logging.run_dir = str(folder)
    config.training.skip_steps = told or []
    return config


def test_a_new_run_skips_only_configured_steps(tmp_path: Path) -> None:
    config = make(tmp_path, 10, told=[4, 7])
    skips = find_skipped_steps(config, None)
    assert [step for step in range(1, 10) if step in skips] == [4, 7]
    assert (skips.found, skips.done, skips.count_updates(3)) == (set(), set(), 3)


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    config = make(tmp_path, 10, told=[2, 12], skipped_steps=[5, 8])
    lines = [{"step": 8, "action": "skip"}, {"step": 11, "action": "rollback"}]
    lines += [{"step": 9, "action": "stop"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "nonfinite.jsonl").write_text(text + '{"step": 13, "act')  # a crash cut it off
    skips = find_skipped_steps(config, tmp_path)
    assert skips.found == {5, 8, 11}
    assert skips.done == {5, 8}, "step 2 was done with its update before"
    assert (count_updates(tmp_path, 10), skips.count_updates(10)) == (8, 8)
    skips.done |= {11, 12}
    assert skips.to_save() == [5, 8, 11, 12]
    skips.rewind(10)
    assert (skips.count_updates(10), skips.to_save()) == (8, [5, 8, 11])


def test_bare_weights_have_no_past(tmp_path: Path) -> None:
    config = make(tmp_path, 10, skipped_steps=[5], optimizer=False)
    assert find_skipped_steps(config, tmp_path).to_save() == []


def test_damage(tmp_path: Path) -> None:
    config = make(tmp_path, 10, skipped_steps=[5, "x"])
    with pytest.raises(CheckpointError, match=r"state.json: skipped_steps\[1\] is 'x', not"):
        find_skipped_steps(config, tmp_path)
    config = make(tmp_path, 10)
    (tmp_path / "nonfinite.jsonl").write_text('{"step": 3}\n{"step": 4, "action": "skip"}\n')
    with pytest.raises(
        DataError, match=r"nonfinite.jsonl:1: the line is not a JSON object with step and action"
    ):
        find_skipped_steps(config, tmp_path)
