"""A terminal is asked what it can show, and nothing of its answer is left over."""

import os
import pty
import select
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_chameleon.inference.terminal.detection import find_pictures

XTERM = {"TERM": "xterm-256color"}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The terminal's end and the program's end."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def answer(end: int, *parts: bytes) -> None:
    """Answer the question, in parts."""
    asked = b""
    while not asked.endswith(b"\x1b[c"):
        asked += os.read(end, 100)
    for part in parts:
        os.write(end, part)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((b"\x1b[?62;4;22c",), "sixel"),
        ((b"\x1b[?4;", b"6c"), "sixel"),
        ((b"\x1b[?64;1;2;14;24c",), "blocks256"),
        ((b"\x1b_Gi=31;OK\x1b\\", b"\x1b[?62;4c"), "kitty"),
        ((b"\x1b_Gi=31;ENOTSUPPORTED:no\x1b\\\x1b[?6c",), "blocks256"),
        ((b"\x1b[?c",), "blocks256"),
        ((b"",), "blocks256"),
        ((b"\x1b[?" + b"9" * 5000,), "blocks256"),
    ],
)
def test_answers(terminal: tuple[int, int], parts: tuple[bytes, ...], found: str) -> None:
    end, program = terminal
    before = termios.tcgetattr(program)
    thread = threading.Thread(target=answer, args=(end, *parts))
    thread.start()
    assert find_pictures(program, XTERM, seconds=0.2) == found
    thread.join()
    assert termios.tcgetattr(program) == before
    if parts[-1].endswith(b"c"):
        assert not select.select([program], [], [], 0.02)[0], "the user would see the rest"


def test_colours(terminal: tuple[int, int]) -> None:
    environment = {**XTERM, "COLORTERM": "truecolor"}
    assert find_pictures(terminal[1], environment, seconds=0.01) == "blocks"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}, {**XTERM, "NO_COLOR": "1"}])
def test_terminals_that_want_plain_text_are_not_asked(
    terminal: tuple[int, int], environment: dict[str, str]
) -> None:
    assert find_pictures(terminal[1], environment) == "none"
    assert not select.select([terminal[0]], [], [], 0.02)[0]


def test_what_was_typed_ahead_is_kept(terminal: tuple[int, int]) -> None:
    end, program = terminal
    os.write(end, b"next message\n")
    assert find_pictures(program, XTERM, seconds=0.2) is None
    assert os.read(program, 100) == b"next message\n"
