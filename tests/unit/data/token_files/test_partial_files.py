"""The folder PREFIX.partial: links and names that others made, states that somebody edited."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_chameleon.data.token_files.partial_files import PartialFiles
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file
from megatron_chameleon.errors import DataError


def add_and_keep(prefix: Path, tokenizer, numbered) -> None:
    """One document in an unfinished token file of the job "j"."""
    with TokenFileWriter(prefix, tokenizer, "j") as writer:
        writer.add(numbered([3])[0], 0)
        writer.save({"at": 1})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder of somebody else's files."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("tokens.bin", "lock", "state.json", "kept"):
        (folder / name).write_text("kept")
    return folder


def test_a_partial_folder_that_is_a_link_is_refused(tmp_path, other, tokenizer, numbered) -> None:
    (tmp_path / "t.partial").symlink_to(other)
    for restart in (False, True):
        message = r"t\.partial: is a link, and the program puts its own files there. Remove it"
        with (
            pytest.raises(DataError, match=message),
            TokenFileWriter(tmp_path / "t", tokenizer, "j", restart=restart),
        ):
            pass
    assert {path.read_text() for path in other.iterdir()} == {"kept"}
    (tmp_path / "t.partial").unlink()
    add_and_keep(tmp_path / "t", tokenizer, numbered)


@pytest.mark.parametrize("name", ["lock", "tokens.bin", "tokens.idx"])
def test_a_link_in_the_partial_folder_is_refused(
    tmp_path, other, tokenizer, numbered, name
) -> None:
    add_and_keep(tmp_path / "t", tokenizer, numbered)
    path = tmp_path / "t.partial" / name
    path.unlink()
    path.symlink_to(other / "kept")
    with (
        pytest.raises(DataError, match="Too many levels of symbolic links"),
        TokenFileWriter(tmp_path / "t", tokenizer, "j"),
    ):
        pass
    assert {path.read_text() for path in other.iterdir()} == {"kept"}
    assert (tmp_path / "t.partial" / "state.json").exists()


@pytest.mark.parametrize("name", ["lock", "tokens.bin"])
def test_a_fifo_in_the_partial_folder_does_not_block(tmp_path, tokenizer, name) -> None:
    (tmp_path / "t.partial").mkdir()
    os.mkfifo(tmp_path / "t.partial" / name)
    with (
        pytest.raises(DataError, match="not a regular file"),
        TokenFileWriter(tmp_path / "t", tokenizer),
    ):
        pass


def test_an_input_is_not_replaced(tmp_path, tokenizer) -> None:
    for name in ("t.json", "t.dropped.jsonl"):
        (tmp_path / name).write_text("kept")
        message = rf"--output .*{name}: would replace .*, which the command reads. Give another"
        with (
            pytest.raises(DataError, match=message),
            TokenFileWriter(tmp_path / "t", tokenizer, inputs=[str(tmp_path / name)]),
        ):
            pass
        assert (tmp_path / name).read_text() == "kept"
    assert not (tmp_path / "t.partial").exists()


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, tokenizer, monkeypatch) -> None:
    def full(self, sizes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartialFiles, "open", full)
    with (
        pytest.raises(DataError, match=r"t: cannot write the token file \(No space left"),
        TokenFileWriter(tmp_path / "t", tokenizer, "j"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": "x"}, r"documents is 'x'"),
        ({"tokens": -1}, r"tokens is -1"),
        ({"tokens": True}, r"tokens is True"),
        ({"tokens": 10**30}, r"tokens\.bin: 6 bytes, but state\.json names 2000"),
        ({"position": []}, r"position is \[\]"),
        ({"sources": {"a": {"tokens": None}}}, r"tokens of the source 'a' is None"),
        ({"sources": {"a": 1}}, r"must be a mapping"),
        ({"sources": 3}, r"no attribute 'items'"),
        ({"dropped": {"a": []}}, r"dropped is not a table of numbers"),
        ({"unknown": 1}, r"unexpected keyword argument 'unknown'"),
        ("[]", r"must hold a JSON object, not a list"),
        ("{", r"is not valid JSON"),
        ("[" * 9999 + "]" * 9999, r"nested deeper than 64 levels"),
    ],
)
def test_a_state_that_was_edited_is_refused(tmp_path, tokenizer, numbered, change, message) -> None:
    add_and_keep(tmp_path / "t", tokenizer, numbered)
    path = tmp_path / "t.partial" / "state.json"
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_text(change)
    with (
        pytest.raises(DataError, match=message + r".*Start again with --restart"),
        TokenFileWriter(tmp_path / "t", tokenizer, "j"),
    ):
        pass
    with TokenFileWriter(tmp_path / "t", tokenizer, "j", restart=True) as writer:
        writer.add(numbered([4])[0], 0)
        writer.commit()
    assert len(open_token_file(tmp_path / "t", tokenizer)) == 1
