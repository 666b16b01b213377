"""The last net: what the command says of an exception that is neither a mistake nor a fault.

It is a bug of ours, so the line says which verb and which line of code, and asks for a report. The
traceback goes to a file, so that nothing is lost if the bug does not come a second time. In a job
of several processes or of a batch system it is printed too: there the log is what remains.
"""

import contextlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

from megatron_chameleon.errors import first_line

PACKAGE_FOLDER = Path(__file__).parents[1]
JOB_VARIABLES = ("RANK", "SLURM_JOB_ID", "PBS_JOBID")


def report_bug(error: Exception, argv: list[str]) -> None:
    """Print one line about an unexpected exception, and keep its traceback.

    Args:
        error: The exception.
        argv: The words behind ``chameleon``.
    """
    text = "".join(traceback.format_exception(error))
    kept = _keep(text, argv)
    if kept is None or "--debug" in argv or any(name in os.environ for name in JOB_VARIABLES):
        print(text, end="", file=sys.stderr)
    verb = " ".join(argv[:1])
    report = "Please report it with its traceback"
    if kept is not None:
        report += f", which is in {kept}"
    print(
        f"error: chameleon {verb}: {type(error).__name__}: {first_line(error)[:300]}"
        f"{_place(error)}. This is a bug of megatron_chameleon. {report}.",
        file=sys.stderr,
    )


def _keep(text: str, argv: list[str]) -> str | None:
    """Write the traceback into the folder for temporary files; None if there is none."""
    header = f"chameleon {' '.join(argv[:1])}, Python {sys.version}\n\n"
    with contextlib.suppress(OSError):
        number, path = tempfile.mkstemp(prefix="chameleon-bug-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(header + text)
        return path
    return None


def _place(error: Exception) -> str:
    """The innermost line of this package: `` (data/x.py:12)``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE_FOLDER):
            return f" ({path.relative_to(PACKAGE_FOLDER)}:{frame.lineno})"
    return ""
