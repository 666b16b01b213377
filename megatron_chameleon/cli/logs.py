"""Show the library's log lines on the console, as the command line wants them.

Library code calls ``logging.getLogger(__name__)`` and never prints. Every verb runs inside
``shown_logs``, which prints the message of each record and nothing else:

    level             goes to   looks like
    DEBUG, INFO       stdout    message
    WARNING           stderr    warning: message
    ERROR, CRITICAL   stderr    message

A record with ``extra={"stderr": True}`` goes to stderr at any level. That is for progress of verbs
whose standard output is a result; in this folder ``progress`` does it.

Texts from files, such as ids, file names and captions, are shown without the characters that a
terminal would obey; ``show`` prints results in the same way. Secrets in log lines and errors, such
as the password of a URL, are masked.

Processes that a verb spawns have no such handler: they return lines to their parent.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.terminal import escape_line, escape_text

PACKAGE = "megatron_chameleon"

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def shown_logs(level: int = logging.INFO) -> Iterator[None]:
    """Print the records of this package's loggers from ``level`` upwards while the block runs."""
    logger = logging.getLogger(PACKAGE)
    handler = ConsoleHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    # A handler that another library gives the root logger would print each line a second time.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def progress(line: str) -> None:
    """Show how far a verb is on stderr, so that its standard output holds the result alone."""
    _logger.info(line, extra={"stderr": True})


def show(result: object) -> None:
    """Print a result on stdout: a line, or a text of several lines.

    It is flushed, because ``serve`` says where it listens and then runs on for days.
    """
    print(escape_text(str(result)), flush=True)


def show_error(line: str) -> None:
    """Print one error on stderr."""
    print(f"error: {escape_line(mask_secrets(line))}", file=sys.stderr)


def show_generated(text: str) -> None:
    """Print what a model wrote: escaped on a terminal, and as it is into a file or a pipe."""
    print(escape_text(text) if sys.stdout.isatty() else text)


class ConsoleHandler(logging.Handler):
    """Prints each message to stdout or stderr, whatever these are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        is_error = record.levelno >= logging.WARNING or getattr(record, "stderr", False)
        stream = sys.stderr if is_error else sys.stdout
        # A line break in somebody's file name must not forge a line of ours.
        text = escape_line(mask_secrets(record.getMessage()))
        if record.exc_info:
            text += "\n" + escape_text(logging.Formatter().formatException(record.exc_info))
        print(f"{prefix}{text}", file=stream, flush=True)
