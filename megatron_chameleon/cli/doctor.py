"""``chameleon doctor``: what this machine can run, what is missing for more, and how to get it.

The exit code is 0 if the CPU demo can run here, and 2 otherwise.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.examination import (
    DEMO,
    GROUPS,
    MISSING,
    OK,
    WARN,
    Check,
    examine,
)
from megatron_chameleon.cli.logs import show

if TYPE_CHECKING:
    from rich.table import Table

EXIT_CODES = "Exit code: 0 if the demo can run on this machine, with or without a GPU; otherwise 2."
_DEMO = Path(__file__).parents[2] / "examples" / "digits" / "run.sh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXIT_CODES
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the verdict and the tables. Exit with 2 if not even the CPU demo can run."""
    checks = list(examine())
    problems = missing_for_demo(checks)
    verdict = {
        "cpu_demo": _verdict("CPU demo", problems),
        "training_7b": _verdict("7B training", missing_for_7b(checks)),
    }
    if args.json:
        rows = [asdict(check) for check in checks]
        report = {"checks": rows, "verdict": verdict, "cpu_ok": not problems}
        show(json.dumps(report | {"summary": summary(checks)}, indent=1))
    else:
        show("\n".join(summary(checks)))
        _print_tables(checks)
    if problems:
        sys.exit(2)


def missing_for_demo(checks: list[Check]) -> list[str]:
    """The names of the rows without which nothing can run."""
    return [check.name for check in checks if check.required and check.status == MISSING]


def missing_for_7b(checks: list[Check]) -> list[str]:
    """The reasons why this machine cannot train the 7B, according to the rows."""
    names = {"GPU": "no GPU", "GPU memory": "too little GPU memory", "NCCL": "no NCCL"}
    by_name = {check.name: check for check in checks}
    if by_name["GPU"].status == MISSING:
        names = {"GPU": names["GPU"]}
    gpu = [words for name, words in names.items() if by_name[name].status == MISSING]
    return [f"no {name}" for name in missing_for_demo(checks)] + gpu


def summary(checks: list[Check]) -> list[str]:
    """What this machine is good for, the most important first, in one to three lines."""
    problems = missing_for_demo(checks)
    if problems:
        rows = [check for check in checks if check.name in problems]
        return [
            f"Not ready for the demo yet. {len(rows)} to do:",
            *(f"  {check.name}: {check.found}. {check.remedy}" for check in rows),
        ]
    how = ": `make demo` runs it" if _DEMO.is_file() else ""
    lines = [f"Fine for the demo{how}; small models train here too."]
    lines += [
        f"  {check.name}: {check.found}. {check.remedy}"
        for check in checks
        if check.group == DEMO and check.status == WARN
    ]
    reasons = missing_for_7b(checks)
    if not reasons:
        lines.append("Fine for training the 7B on this machine's GPUs.")
    elif reasons == ["no GPU"]:
        lines.append("There is no GPU here: the paper's sizes need other machines.")
    else:
        lines.append(f"Not enough for the 7B: {', '.join(reasons)}.")
    return lines


def _verdict(what: str, problems: list[str]) -> str:
    return f"{what}: no, because of: {', '.join(problems)}" if problems else f"{what}: yes"


def _print_tables(checks: list[Check]) -> None:
    """One table per group. What this machine is not for is listed as needed, not as a fault."""
    from rich.console import Console

    # Without a terminal rich assumes 80 columns, which folds every cell to a few letters.
    console = Console(width=None if sys.stdout.isatty() else 160)
    no_gpu = missing_for_7b(checks)[-1:] == ["no GPU"]
    for group, title in GROUPS.items():
        rows = [check for check in checks if check.group == group]
        is_elsewhere = group != DEMO and no_gpu
        absent = [check for check in rows if check.status == MISSING]
        console.print()
        if is_elsewhere and absent:
            console.print(f"{title} would need", style="bold")
        else:
            console.print(title, style="bold")
        console.print(_table(rows, is_elsewhere))


def _table(checks: list[Check], is_elsewhere: bool) -> "Table":
    from rich.table import Table
    from rich.text import Text

    colors = {OK: "green", WARN: "yellow", MISSING: "red"}
    table = Table(box=None, padding=(0, 1), show_header=False)
    for _ in range(5):
        table.add_column(overflow="fold")
    for check in checks:
        word, color = check.status, colors[check.status]
        if is_elsewhere and check.status == MISSING:
            word, color = "needed", "default"
        remedy = "" if check.status == OK else check.remedy
        cells = (check.name, check.found, check.purpose, remedy)
        name, found, purpose, remedy_text = map(Text, cells)
        table.add_row(name, Text(word, style=color), found, purpose, remedy_text)
    return table
