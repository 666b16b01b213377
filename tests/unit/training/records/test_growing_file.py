"""Files that grow by records: whole lines, whatever happened to the last one."""

from contextlib import closing
from pathlib import Path

import pytest

from megatron_chameleon.errors import DataError, TrainingError
from megatron_chameleon.training.records.growing_file import (
    GrowingFile,
    cut_broken_end,
    read_json_lines,
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n'),
        (b'{"a": 1}\n{"b": "\xc3', b'{"a": 1}\n'),
        (b'{"a', b""),
        (b'{"a": 1}\n' + bytes(9), b'{"a": 1}\n'),
    ],
)
def test_the_next_record_has_a_line_of_its_own(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(before)
    cut_broken_end(path)
    assert path.read_bytes() == after
    with closing(GrowingFile(path)) as file:
        file.append(b"{}\n")
    assert path.read_bytes() == after + b"{}\n"


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    with pytest.raises(TrainingError, match=r"log: cannot be written .* Remove the link"):
        GrowingFile(tmp_path / "log")
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"3", b"null", b'{"step": -1}', b'{"step": true}', b'{"step": 1e9}', b"[" * 90_000],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"jsonl:2: the line is not a JSON object with step\. Fix"):
        list(read_json_lines(path))
    path.write_bytes(b'{"step": 1}\n' + line)
    assert [record["step"] for record, _ in read_json_lines(path)] == [1]
