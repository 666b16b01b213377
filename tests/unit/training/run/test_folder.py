"""metrics.jsonl has one whole line per step, even after a crash."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, DataError, TrainingError
from megatron_chameleon.training.run.folder import (
    METRICS,
    RunFolder,
    append_command,
    check_run_folder,
)


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
    message = r"metrics\.jsonl:1: the line is not a JSON object with step"
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
    # root may write anywhere, so the answer of the operating system is replaced
    def refuse(folder: Path) -> None:
        if folder.name == refused:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("megatron_chameleon.training.run.folder.try_to_write", refuse)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for refused in ("run", "checkpoints"):
        with pytest.raises(ConfigError) as caught:
            check_run_folder(tmp_path / "run")
        assert str(caught.value).endswith(
            f"{refused} is not writable (Read-only file system). Choose another folder: this file "
            "system is read-only."
        )


@pytest.mark.parametrize("name", ["command.txt", "run.lock", "metrics.jsonl"])
def test_a_file_that_is_not_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder, where a file of the run belongs"):
        check_run_folder(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    if name == "metrics.jsonl":  # the link is replaced
        check_run_folder(tmp_path)
        return
    with pytest.raises(ConfigError, match=f"{name} is not writable .* Remove the link and run"):
        check_run_folder(tmp_path)


@pytest.mark.parametrize(
    "end",
    [b'{"step": 4, "lo', b'{"step": 4, "loss": "\xff\xfe', b"\x00" * 50, b'{"step": "4"}\n'],
    ids=["cut", "undecodable", "zeros after a power cut", "another type"],
)
def test_any_last_line_that_is_not_one_is_dropped(config: Config, end: bytes) -> None:
    write(config, 0, 3)
    with (Path(config.logging.run_dir) / "metrics.jsonl").open("ab") as file:
        file.write(end)
    write(config, 3, 5)
    assert steps(config) == [1, 2, 3, 4, 5]


def test_metrics_that_were_edited(config: Config) -> None:
    write(config, 0, 4)
    path = Path(config.logging.run_dir) / "metrics.jsonl"
    first, second, third, fourth = path.read_text().splitlines()
    changed = second.replace("1.0", "9.0")
    text = f"\ufeff{first}\r\n\n{third}\n{second}\n{changed}\n{fourth}"
    path.write_bytes(text.encode())
    run = RunFolder(config, 4)
    run.write_metrics({"step": 5, "loss": 1.0})
    run.close()
    lines = path.read_text().splitlines()
    assert lines[:4] == [first, changed, third, fourth], "the last line of a step counts"
    assert steps(config) == [1, 2, 3, 4, 5]
    assert list(run.past_metrics())[1]["loss"] == 9.0


def test_steps_without_metrics_are_named(config: Config) -> None:
    write(config, 0, 9)
    path = Path(config.logging.run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:5]))
    run = RunFolder(config, 9)
    assert run.missing_steps(9) == "2, 6 to 9"
    run.close()
    path.write_text("".join(lines[5:]))  # the run began from a checkpoint elsewhere
    run = RunFolder(config, 9)
    assert run.missing_steps(9) is None
    run.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "alarms.jsonl", "command.txt"])
def test_a_full_disk_leaves_whole_lines(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(config, 0, 2)
    path = Path(config.logging.run_dir) / name
    before = path.read_bytes()
    run = RunFolder(config, 2)
    real = os.write

    def few_bytes_left(descriptor: int, content: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink() != path:
            return real(descriptor, content)
        if len(content) > 3:
            return real(descriptor, bytes(content)[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", few_bytes_left)
        with pytest.raises(TrainingError) as caught:
            run.write_metrics({"step": 3, "loss": 1.0})
            run.write_alarms([{"step": 3}])
            append_command(path)
    run.close()
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device). Make room on the disk and run the "
        "same command again."
    )
    if name != "command.txt":  # to which the second start has added its line
        assert path.read_bytes() == before
    write(config, 2, 3)
    assert steps(config) == [1, 2, 3]
