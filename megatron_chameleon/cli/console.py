"""The standard streams of the command's process, made safe to print to.

``open_console`` replaces them, so that no verb has to think about a pipe whose reader has gone
(``| head -1``), a full disk (``> file``), a closed descriptor (``>&-``) or a locale without
Unicode.

    standard output   the reader has gone: ``OutputClosed``, which ends the command quietly
                      any other failure: an error of one line, as for any file
    standard error    what cannot be written is left out, because nobody could be told
"""

import contextlib
import io
import os
import select
import sys
from typing import Any

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.files import cannot_write

EXIT_OUTPUT_CLOSED = 141
"""What a shell reports for a program that a closed pipe has ended: 128 + SIGPIPE."""


class OutputClosed(BaseException):
    """Nobody reads the standard output any more. Like an interrupt, it is not to be caught."""


def open_console() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``; a closed descriptor becomes the null device.

    Otherwise the next file that is opened would get its number, and with it what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = _stream(sys.stdout, _Output(1, "wb", closefd=False))
    sys.stderr = _stream(sys.stderr, _ErrorOutput(2, "wb", closefd=False))


def drop_output() -> None:
    """Drop what the standard output has not taken, so that the interpreter does not report it
    again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    sys.stdout.flush()


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a terminal that does not block
                select.select([], [self], [])
            return written
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            raise cannot_write("standard output", error, ConfigError) from error


class _ErrorOutput(io.FileIO):
    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _stream(old: Any, raw: io.FileIO) -> io.TextIOWrapper:
    """A text stream like the old one, which cannot fail at a character."""
    if old is not None:
        with contextlib.suppress(OSError):
            old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == 2,
        write_through=getattr(old, "write_through", False),
    )
