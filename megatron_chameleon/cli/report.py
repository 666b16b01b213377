"""``chameleon report RUN [--output FILE]``: one HTML page that shows a run.

chameleon report runs/digits
"""

import argparse
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a run folder; the run may still go on")
    parser.add_argument(
        "--output", metavar="FILE", help="the .html file to write (default: RUN/report.html)"
    )


def _show_modalities(folder: Path) -> None:
    """What the newest check of modalities found; the report names a damaged one as a problem."""
    from contextlib import suppress

    from megatron_chameleon.errors import DataError
    from megatron_chameleon.runs.answers.modalities import read_check
    from megatron_chameleon.terminal import escape_line

    with suppress(DataError):
        check = read_check(folder)
        for text, weight in check.lines():
            show(escape_line(f"{'warning: ' * bool(weight)}step {check.step:,}: {text}"))


def run(args: argparse.Namespace) -> None:
    """Read the run and write the page."""
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.files import write_text
    from megatron_chameleon.outputs import check_name, check_output
    from megatron_chameleon.reports.report import report_page
    from megatron_chameleon.runs.answers.modalities import list_checks
    from megatron_chameleon.runs.run import find_run, run_files
    from megatron_chameleon.terminal import escape_line
    from megatron_chameleon.wording import format_bytes

    folder = find_run(args.folder)
    output = Path(folder / "report.html")
    if args.output is not None:
        output = check_name("--output", args.output)
    check_output("--output", output, run_files(folder))
    with announced(f"reading {folder}"):
        found, page = report_page(folder, page_origin(args))
    write_text(output, page)
    for check in list_checks(folder)[-1:]:
        _show_modalities(check)
    size = format_bytes(len(page.encode("utf-8", "surrogatepass")))
    for problem in found.problems:
        show(escape_line(f"note: {problem}"))
    show(escape_line(f"{output}: {found.name} to step {found.metrics.last_step:,}, {size}"))
