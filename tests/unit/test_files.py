"""Writing a file completely or not at all, and reading one within bounds."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chameleon import files
from megatron_chameleon.errors import CheckpointError, DataError
from places import REPOSITORY


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with files.replace_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["a.txt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with (
        pytest.raises(
            CheckpointError, match=r"a\.txt: cannot be written \(No space left on device\)"
        ),
        files.replace_file(path, CheckpointError) as file,
    ):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_chameleon import files
with files.replace_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_writer(path: Path) -> Path:
    """What a writer of the file leaves that is killed."""
    before = set(path.parent.iterdir())
    command = [sys.executable, "-c", KILLED, path]
    result = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_what_a_killed_writer_left_goes_with_the_next_write_of_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "a"
    kill_a_writer(path)
    left = kill_a_writer(other)
    hexadecimal = left.name.split(".")[2]
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".a.txt.{'0' * 16}.partial").symlink_to("mine")
    (tmp_path / f".a.txt.{'1' * 16}.partial").mkdir()
    (tmp_path / f".a.txt.notes.{hexadecimal}.partial").write_text("kept")
    kept = set(names(tmp_path))
    files.write_text(path, "whole")
    gone = kept - set(names(tmp_path))
    assert len(gone) == 1
    assert gone.pop().startswith(".a.txt.")
    files.write_together({tmp_path / "marker": b"1", other: b"2"})
    assert not left.exists()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_still_grows_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    with files.replace_file(path) as file:
        files.write_text(path, "second")
        assert path.read_text() == "second"
        file.write(b"first")
    assert path.read_text() == "first"

    fsync = os.fsync

    def write_among_them(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        files.write_text(path, "among them")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_among_them)
    files.write_together({path: b"together", tmp_path / "b": b"b"})
    assert path.read_text() == "together"
    assert names(tmp_path) == ["a.txt", "b"]


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock, taken = tmp_path / "a.txt", files.try_lock, []

    def lock_late(descriptor: int) -> bool:
        for left in set(tmp_path.iterdir()) if len(taken) < 2 else ():
            taken.append(left)
            left.unlink()
        return lock(descriptor) and len(taken) != 1

    monkeypatch.setattr(files, "try_lock", lock_late)
    files.write_text(path, "whole")
    assert len(taken) == 2
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["a.txt"]


def test_without_locks_files_are_written_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = kill_a_writer(tmp_path / "a.txt")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files.write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == [left.name, "a.txt"]


def test_a_file_that_grows_too_large_is_one_error(tmp_path: Path) -> None:
    """A limit of the shell acts like a full disk: the rest stays in the file object's buffer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for write in (
            lambda: files.write_bytes(tmp_path / "b", bytes(5000)),
            lambda: files.write_together({tmp_path / "a": b"a", tmp_path / "b": bytes(5000)}),
        ):
            with pytest.raises(DataError, match=r"b: cannot be written \(File too large\)"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_the_mode_follows_the_umask_unless_the_file_is_private(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "shown", "x")
        files.write_text(tmp_path / "secret", "x", private=True)
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"shown": 0o640, "secret": 0o600}


def test_a_device_is_written_and_not_replaced() -> None:
    files.write_text("/dev/null", "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(DataError, match="No space left on device"):
        files.write_text("/dev/full", "x")


def test_a_link_is_replaced_and_what_it_leads_to_is_untouched(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "a").symlink_to("other")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "other").read_text() == "other"
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("opened", [files.open_lock, files.open_to_append])
def test_locks_and_growing_files_do_not_follow_links(tmp_path: Path, opened) -> None:
    (tmp_path / "a").symlink_to("other")
    with pytest.raises(DataError, match=r"symbolic links.*Remove the link"):
        opened(tmp_path / "a")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_partial_folder_is_a_folder_of_ours(tmp_path: Path, kind: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    name = tmp_path / ".a.partial"
    if kind == "link":
        name.symlink_to("other")
    else:
        name.touch()
    with pytest.raises(DataError, match=r"puts its own files there.*give another --output"):
        files.own_folder(name)
    with pytest.raises(DataError, match=r"if you do not need it, or move\.$"):
        files.own_folder(name, elsewhere="move")
    assert (tmp_path / "other" / "kept").exists()


def test_emptying_a_folder_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    folder = files.own_folder(tmp_path / ".a.partial")
    (folder / "link").symlink_to("../other")
    assert files.empty_folder(folder)
    assert not files.empty_folder(folder)
    assert (tmp_path / "other" / "kept").exists()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "loop", "symbolic links"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "directory"),
        (tmp_path / "missing", "no such file"),
        ("null\0byte", "no such file"),
    ):
        with pytest.raises(DataError, match=reason):
            files.read_bytes(name)


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    assert files.read_bytes(tmp_path / "a", limit=11) == bytes(11)
    with pytest.raises(DataError, match="has 11 bytes, more than the 10 that"):
        files.read_bytes(tmp_path / "a", limit=10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"3", "not a number"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b"1" * 5000, "not valid JSON"),
    ],
)
def test_malformed_json_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        files.read_json_object(path, CheckpointError)
    assert "\n" not in str(caught.value)


def test_json_of_the_largest_depth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 64 + "]" * 64)
    assert json.dumps(files.read_json(path)) == "[" * 64 + "]" * 64


def test_a_folder_is_checked_before_the_work(tmp_path: Path) -> None:
    assert names(files.make_folder(tmp_path / "a" / "b")) == []
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(DataError, match="a part of this path is a file"):
        files.make_folder(tmp_path / "file" / "a")


def test_folders_that_were_made_for_a_failed_write_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(files, "_create", full)
    monkeypatch.setattr(files, "try_to_write", full)
    for write in (
        lambda path: files.write_bytes(path, b"x"),
        lambda path: files.write_together({path: b"x"}),
        files.make_folder,
    ):
        for place in (tmp_path / "a" / "b" / "c", tmp_path / "kept" / "c"):
            with pytest.raises(DataError, match="No space left"):
                write(place)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
