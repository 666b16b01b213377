"""metrics.jsonl has one whole line per step, even after a crash."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.training.run.folder import METRICS, RunFolder, check_run_folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.logging.run_dir = str(tmp_path / "run")
    return config


def steps(config: Config) -> list[int]:
    lines = (Path(config.logging.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def write(config: Config, first_step: int, last_step: int) -> None:
    run = RunFolder(config, first_step)
    for step in range(first_step + 1, last_step + 1):
        run.write_metrics({"step": step, "loss": 1.0})
    run.close()


def test_a_step_is_a_line_with_null_where_unknown(config: Config) -> None:
    write(config, 0, 1)
    line = (Path(config.logging.run_dir) / "metrics.jsonl").read_text()
    record = json.loads(line)
    assert tuple(record) == METRICS
    assert (record["step"], record["loss"], record["mfu"]) == (1, 1.0, None)


def test_steps_that_are_done_again_are_dropped(config: Config) -> None:
    write(config, 0, 5)
    write(config, 3, 4)
    assert steps(config) == [1, 2, 3, 4]


def test_a_last_line_cut_off_by_a_crash_is_dropped(config: Config) -> None:
    write(config, 0, 3)
    with (Path(config.logging.run_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write(config, 3, 5)
    assert steps(config) == [1, 2, 3, 4, 5]


def test_a_broken_line_in_the_middle_is_refused_and_kept(config: Config) -> None:
    write(config, 0, 1)
    path = Path(config.logging.run_dir) / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    message = r"metrics\.jsonl:1: the line is not a JSON object with a step"
    with pytest.raises(DataError, match=message):
        RunFolder(config, 1)
    assert path.read_text().startswith("nonsense\n")


def test_the_folder_records_how_the_run_was_started(config: Config) -> None:
    write(config, 0, 1)
    write(config, 1, 2)
    folder = Path(config.logging.run_dir)
    assert load_config(folder / "config.yaml") == config
    assert len((folder / "command.txt").read_text().splitlines()) == 2
    assert json.loads((folder / "environment.json").read_text())["packages"]["megatron-core"]


def test_a_place_where_no_run_folder_can_be(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logging\.run_dir: .*/file is a file\. Choose another"):
        check_run_folder(tmp_path / "file" / "run")


def test_a_place_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so the answer of the operating system is replaced.
    monkeypatch.setattr(
        "megatron_chameleon.training.run.folder.os.access", lambda path, mode: False
    )
    with pytest.raises(ConfigError, match="is not writable"):
        check_run_folder(tmp_path / "run")
