"""Outputs are checked before the work, and results of long work are kept anyhow."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_chameleon import files, outputs
from megatron_chameleon.errors import ConfigError, DataError


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder in which each write says that the disk is full; all others can be written."""
    folder = tmp_path / "full"
    folder.mkdir()
    opened = files._create
    tried = files.try_to_write

    def create(path: Path, private: bool = False):
        if path.parent == folder and not path.name.startswith("small"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, private)

    def try_to_write(place: Path) -> None:
        if place.resolve() == folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tried(place)

    monkeypatch.setattr(files, "_create", create)
    for module in (files, outputs):
        monkeypatch.setattr(module, "try_to_write", try_to_write)
    yield folder
    assert list(folder.iterdir()) == []


def test_files_that_belong_together_are_written_or_none_of_them_is(full_disk: Path) -> None:
    good = full_disk.parent / "good"
    files.write_together({good / "marker": b"1", good / "data": b"2"})
    with pytest.raises(DataError, match=r"full/b: cannot be written \(No space left on device\)"):
        files.write_together({good / "marker": b"3", good / "data": b"4", full_disk / "b": b"5"})
    assert (good / "marker").read_bytes() == b"1"
    assert (good / "data").read_bytes() == b"2"
    assert sorted(path.name for path in good.iterdir()) == ["data", "marker"]


def test_the_marker_is_gone_while_the_others_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_together({tmp_path / "marker": b"1", tmp_path / "data": b"2"})
    replaced: list[tuple[str, bool]] = []
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        replaced.append((target.name, (tmp_path / "marker").exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.write_together({tmp_path / "marker": b"3", tmp_path / "data": b"4"})
    assert replaced == [("data", False), ("marker", False)]


def test_a_result_that_its_folder_does_not_take_is_saved_elsewhere(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = full_disk.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(DataError, match=r"full/weights: cannot be written") as caught:
        outputs.save_anyhow(lambda place: files.write_bytes(place / "weights", b"w"), full_disk)
    (saved,) = temporary.glob("chameleon-result-*/weights")
    assert saved.read_bytes() == b"w"
    wanted = (
        f"The result is in {saved.parent} instead: make room, and move its files to {full_disk}"
    )
    assert caught.value.remedy == wanted


def test_a_result_that_no_folder_takes_is_the_first_error(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.chdir(full_disk)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))

    def save(folder: Path) -> None:
        raise files.cannot_write(folder, OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(DataError, match=r"full: cannot be written .* Make room on the disk"):
        outputs.save_anyhow(save, full_disk)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"--html: the name is empty"),
        ("-", r"--html: a dash is not a name here. Write /dev/stdout"),
        ("folder", r"folder: cannot be written \(Is a directory\). Give the name of a file"),
        ("input/x.html", r"x.html: cannot be written \(Not a directory\)"),
        ("input", r"--html input: would replace input, which the command reads"),
        ("link", r"--html link: would replace link, which the command reads"),
        ("hard", r"--html hard: would replace hard, which the command reads"),
        ("loop/x", r"loop/x: cannot be written \(Not a directory\)"),
        ("full/x", r"full/x: cannot be written \(No space left on device\). Make room"),
    ],
)
def test_an_output_file_is_checked_before_the_work(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(full_disk.parent)
    Path("folder").mkdir()
    Path("input").write_text("kept")
    Path("link").symlink_to("input")
    Path("hard").hardlink_to("input")
    Path("loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=message):
        outputs.check_output("--html", name, ["missing", "null\0", "input"], ConfigError)
    assert Path("input").read_text() == "kept"


def test_an_output_that_can_be_written_passes_and_nothing_stays(tmp_path: Path) -> None:
    assert outputs.check_output("--html", tmp_path / "new" / "a") == tmp_path / "new" / "a"
    assert list(tmp_path.iterdir()) == []
    for device in ("/dev/stdout", "/dev/full", "/dev/null"):
        outputs.check_output("--html", device, ["/dev/null"])


def test_an_output_folder_is_checked_without_being_made(full_disk: Path) -> None:
    folder = full_disk.parent / "a" / "b"
    assert outputs.check_output_folder("--output", folder) == folder
    assert not folder.parent.exists()
    (full_disk.parent / "file").touch()
    (full_disk.parent / "dangling").symlink_to("nowhere")
    for name, message in (
        ("file/x", r"file/x: cannot be written \(Not a directory\)"),
        ("dangling/x", r"cannot be written \(Not a directory\)"),
        ("full/x/y", r"full/x/y: cannot be written \(No space left on device\)"),
    ):
        with pytest.raises(DataError, match=message):
            outputs.check_output_folder("--output", full_disk.parent / name)
