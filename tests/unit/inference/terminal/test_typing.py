"""Lines that people type: paths of images, messages of several lines, the file of the history."""

import io
import random
from pathlib import Path

import pytest

from megatron_chameleon.inference.terminal.lines import Lines, history_file
from megatron_chameleon.inference.terminal.paths import escaped, read_paths, split_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "My Photo (1).JPG", "é漢.webp", "notes.txt", "it's.gif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{}/cat.png", ["!{}/cat.png"]),
        ("what is {}/cat.png?", ["what is", "!{}/cat.png", "?"]),
        ("{}/cat.png and cat.png, too", ["!{}/cat.png", "and", "!cat.png", ", too"]),
        (r"{}/My\ Photo\ \(1\).JPG ", ["!{}/My Photo (1).JPG"]),
        ("'{}/My Photo (1).JPG' \"cat.png\"", ["!{}/My Photo (1).JPG", "!cat.png"]),
        ("file://{}/My%20Photo%20(1).JPG", ["!{}/My Photo (1).JPG"]),
        ("~/é漢.webp (is it nice?)", ["!{}/é漢.webp", "(is it nice?)"]),
        ('"{}/it\'s.gif"', ["!{}/it's.gif"]),
        ("(cat.png)", ["(cat.png)"]),
        ("dog.png is missing, notes.txt and folder.png are none", None),
        ("it's a 'quote' and \"another", None),
        ("a/b\\", None),
        ("x" * 5000 + ".png", None),
        ("\0.png", None),
    ],
)
def test_paths_in_messages(folder: Path, line: str, expected: list[str] | None) -> None:
    found = [f"!{p}" if isinstance(p, Path) else p for p in split_images(line.format(folder))]
    assert found == ([line] if expected is None else [e.format(folder) for e in expected])


def test_no_line_breaks_it(folder: Path) -> None:
    rng = random.Random(2)
    pieces = ["cat.png", "'", '"', "\\", " ", "/", "~", "file://", "%", "a", ".", "?", "\n"]
    for _ in range(3000):
        line = "".join(rng.choices(pieces, k=rng.randrange(12)))
        kept = "".join(p for p in split_images(line) if isinstance(p, str))
        assert len(kept) <= len(line)


def test_paths_behind_a_command(folder: Path) -> None:
    assert list(read_paths("My Photo (1).JPG")) == ["My Photo (1).JPG"]
    assert list(read_paths("cat.png 'My Photo (1).JPG'")) == ["cat.png", "My Photo (1).JPG"]
    assert list(read_paths(" ~/cat.png missing.png ")) == [f"{folder}/cat.png", "missing.png"]
    assert list(read_paths("")) == []
    for path in folder.iterdir():
        assert list(read_paths(f"{escaped(path)} cat.png")) == [str(path), "cat.png"]


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("a\nb\r\n\nc", ["a", "b", "", "c"]),
        ("one \\\ntwo\\\n three\nnext", ["one \ntwo\n three", "next"]),
        ("ends in two \\\\\nnext", ["ends in two \\\\", "next"]),
        ('"""a\n b\n"""\nc', ["a\n b", "c"]),
        ('"""in one line"""\nc', ["in one line", "c"]),
        ('"""\nnever ends\n', ["\nnever ends"]),
        ("last \\", ["last "]),
        ("", []),
    ],
)
def test_messages_of_several_lines(typed: str, messages: list[str]) -> None:
    lines = Lines(io.StringIO(typed, newline=""), is_terminal=False)
    assert list(iter(lines.read, None)) == messages


def test_bytes_that_are_no_text_are_replaced() -> None:
    source = io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8")
    assert Lines(source, is_terminal=False).read() == "a\ufffd"


def test_the_history_is_state() -> None:
    assert history_file({"XDG_STATE_HOME": "/s"}) == Path("/s/megatron_chameleon/chat_history")
    own = Path.home() / ".local/state/megatron_chameleon/chat_history"
    assert history_file({}) == history_file({"XDG_STATE_HOME": "relative"}) == own
