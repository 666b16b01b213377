"""``chameleon status RUN...``: how runs stand, on one screen each.

chameleon status runs/digits
chameleon status runs --watch
chameleon status runs/digits --json | jq .step
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import WATCH_SECONDS
from megatron_chameleon.terminal import escape_text
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.runs.status import RunStatus

USUAL_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run folder, or a folder with runs in it",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds_or_run,
        const=USUAL_SECONDS,
        metavar="SECONDS",
        help="show it again every so many seconds until Ctrl-C (default: 5): the screens on a "
        "terminal, otherwise a line per run",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print one JSON object per run, each on a line"
    )
    form.add_argument(
        "--best",
        action="store_true",
        help="print the path of each run's checkpoint with the lowest held-out loss, or of the "
        "newest one if none was measured, and nothing else",
    )


def _seconds_or_run(text: str) -> float | str:
    """The seconds behind ``--watch``; or a run, as in ``chameleon status --watch RUN``."""
    try:
        float(text)
    except ValueError:
        return text
    return float(WATCH_SECONDS(text))


def run(args: argparse.Namespace) -> None:
    """Read the runs and print."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.runs.status import StatusReader, find_runs

    paths, watch = list(args.runs), args.watch
    if isinstance(watch, str):
        paths.insert(0, watch)
        watch = USUAL_SECONDS
    if not paths:
        raise ConfigError("RUN", "no run is given", "Give a run folder, such as runs/default")
    runs = find_runs(paths)
    if args.best:
        from megatron_chameleon.runs.checkpoints import best_checkpoint

        show("\n".join(str(best_checkpoint(run).path) for run in runs))
        return
    reader = StatusReader()
    while True:
        found = [reader.read(run) for run in runs]
        if args.json:
            for status in found:
                show(json.dumps(status.to_json(), allow_nan=False))
        else:
            _print(found, is_watching=watch is not None)
        if watch is None:
            return
        sys.stdout.flush()
        time.sleep(watch)
        runs = list(dict.fromkeys([*runs, *_find_again(paths)]))


def _find_again(paths: list[str]) -> list[Path]:
    """The runs of the paths, of which some may be new; none if a path has lost its runs."""
    from megatron_chameleon.errors import DataError
    from megatron_chameleon.runs.status import find_runs

    try:
        return find_runs(paths)
    except DataError:
        return []


def _print(found: list["RunStatus"], *, is_watching: bool) -> None:
    from megatron_chameleon.runs.status_screen import status_line, status_screen

    columns, rows = shutil.get_terminal_size()
    if not is_watching:
        show("\n\n".join(status_screen(status, columns) for status in found))
        return
    if not sys.stdout.isatty():
        show("\n".join(map(status_line, found)))
        return
    lines = "\n\n".join(status_screen(status, columns) for status in found).splitlines()
    if len(lines) >= rows:  # one line each, and what does not fit is left out
        lines = [status_line(status)[:columns] for status in found]
    if len(lines) >= rows:
        kept = max(0, rows - 2)
        lines = [*lines[:kept], f"... {counted(len(lines) - kept, 'more run')}"]
    sys.stdout.write(redrawn(lines))


def redrawn(lines: list[str]) -> str:
    """What replaces the content of a terminal by lines, without flickering."""
    body = "".join(f"{escape_text(line)}\x1b[K\n" for line in lines)
    return f"\x1b[H{body}\x1b[J"
