"""``chameleon compare RUN RUN...``: how runs went side by side, and how they were set up.

chameleon compare runs/a runs/b --output compare.html --x trained_tokens
"""

import argparse
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.wording import counted

AXES = ("step", "tokens", "trained_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run folder; give two or more")
    parser.add_argument("--output", metavar="FILE", help="also write an HTML page with the curves")
    parser.add_argument(
        "--x",
        choices=AXES,
        default="step",
        help="what the curves of the page are drawn over, for runs of different batch sizes "
        "(default: step)",
    )


def run(args: argparse.Namespace) -> None:
    """Read the runs, print the tables and write the page."""
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.files import write_text
    from megatron_chameleon.outputs import check_output
    from megatron_chameleon.reports.comparison import (
        MOST_RUNS,
        comparison_page,
        comparison_text,
        missing_axis,
    )
    from megatron_chameleon.reports.curves import wants
    from megatron_chameleon.runs.run import find_run, read_run, run_files
    from megatron_chameleon.terminal import escape_line, escape_text

    if not 2 <= len(args.folders) <= MOST_RUNS:
        what = f"{counted(len(args.folders), 'run')} given"
        raise ConfigError("compare", what, f"Give 2 to {MOST_RUNS} run folders")
    folders = [find_run(folder) for folder in args.folders]
    output = None
    if args.output is not None:
        inputs = [file for folder in folders for file in run_files(folder)]
        output = check_output("--output", args.output, inputs)
    with announced(f"reading {counted(len(folders), 'run')}"):
        runs = [read_run(folder, wants) for folder in folders]
    if problem := missing_axis(runs, args.x):
        raise problem
    if output is None:
        show(escape_text(comparison_text(runs)))
        return
    write_text(Path(output), comparison_page(runs, args.x, page_origin(args)))
    show(escape_text(comparison_text(runs)))
    show(escape_line(f"{output}: {counted(len(runs), 'run')} over {args.x}"))
