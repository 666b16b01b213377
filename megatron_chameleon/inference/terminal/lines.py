"""Read what somebody types: lines with editing and a history, or the lines of a pipe."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from megatron_chameleon.inference.terminal.paths import escaped

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
"""A line that begins with it begins a message of several lines, up to a line that ends with it."""
HISTORY_LINES = 1000


class Lines:
    """Reads one message after the other.

    Args:
        source: Where lines come from; with ``is_terminal`` it is the standard input.
        is_terminal: Whether somebody types at a terminal.
    """

    def __init__(self, source: TextIO, is_terminal: bool) -> None:
        self._source, self._is_terminal = source, is_terminal
        if hasattr(source, "reconfigure"):
            source.reconfigure(errors="replace")

    def read(self) -> str | None:
        """The next message, or None at the end.

        A backslash at the end of a line goes on in the next line, and so does what begins with
        three quotation marks.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was typed is dropped.
        """
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        while line.endswith("\\") and not line.endswith("\\\\"):
            more = self._line(MORE)
            line = line[:-1] + ("" if more is None else "\n" + more)
        return line

    def _block(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            more = self._line(MORE)
            if more is None:
                return "\n".join(lines)
            line = more
        return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)]).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if not self._is_terminal:
            line = self._source.readline()
            return line.rstrip("\r\n") if line else None
        sys.stdout.flush()
        try:
            return input(prompt)
        except EOFError:
            return None


@contextlib.contextmanager
def line_editing(words: Sequence[str], environment: Mapping[str, str]):  # type: ignore[no-untyped-def]
    """Edit lines at the terminal, and keep them for the next time.

    Args:
        words: What Tab completes at the beginning of a line, and paths behind one of them.
        environment: The process's; it says where the history is kept.
    """
    try:
        import readline
    except ImportError:  # Python without it: lines are read as the terminal has them
        yield
        return
    file = history_file(environment)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(lambda text, state: _completion(readline, words, text, state))
    readline.parse_and_bind("tab: complete")
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a conversation must not end with an error for this
            _keep_history(readline, file, readline.get_current_history_length() - before)


def history_file(environment: Mapping[str, str]) -> Path:
    """Where the lines are kept: in the folder of the XDG specification for such state."""
    state = environment.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"  # noqa: PTH117
    return folder / "megatron_chameleon" / "chat_history"


def _keep_history(readline, file: Path, lines: int) -> None:  # type: ignore[no-untyped-def]
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    readline.append_history_file(max(0, lines), file)


def _completion(readline, words: Sequence[str], text: str, state: int) -> str | None:  # type: ignore[no-untyped-def]
    if not readline.get_begidx():
        found = [f"{word} " for word in words if text and word.startswith(text)]
    elif readline.get_line_buffer().startswith("/"):
        place = Path(text).expanduser()
        folder, beginning = (place, "") if text.endswith("/") else (place.parent, place.name)
        try:
            names = sorted(path for path in folder.iterdir() if path.name.startswith(beginning))
        except OSError:
            names = []
        found = [escaped(path) + "/" * path.is_dir() for path in names]
    else:
        found = []
    return found[state] if state < len(found) else None
