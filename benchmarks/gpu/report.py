"""Write the results as JSON and as Markdown tables, without importing anything that is measured."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import format_figure

Row = dict[str, Any]


def write_results(folder: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Write ``results.json`` and ``results.md``, each as a whole.

    Args:
        folder: An existing folder.
        head: Machine, versions and command, and the parts with their state.
        rows: Rows as ``common.Row`` writes them.
    """
    _replace(folder / "results.json", json.dumps({**head, "rows": rows}, indent=1) + "\n")
    _replace(folder / "results.md", markdown(head, rows))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def markdown(head: dict[str, Any], rows: list[Row]) -> str:
    """The tables of all parts; a row with different figures from those before starts a new one."""
    lines = ["# GPU benchmark", "", f"`{head['command']}`, {head['started']}", ""]
    lines += [f"- {name}: {value}" for name, value in head["machine"].items()]
    lines += ["", "MFU and TFLOP/s: `megatron_chameleon/planner/flops.py`; peaks: `gpus.py`.", ""]
    for part, state in head["parts"].items():
        lines += [f"## {part}", "", f"{state['state']}, {state['seconds']:.0f} s", ""]
        for table in _split([row for row in rows if row["part"] == part]):
            lines += _table(table)
    return "\n".join(lines)


def _split(rows: list[Row]) -> list[list[Row]]:
    tables: list[list[Row]] = []
    columns: set[str] = set()
    for row in rows:
        found = set(row["figures"])
        if not tables or not (found <= columns or columns <= found):
            tables.append([])
            columns = set()
        tables[-1].append(row)
        columns |= found
    return tables


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    lines = [
        f"| | {' | '.join([*columns, 'peak GiB', 'note'])} |",
        f"|{'---|' * (len(columns) + 3)}",
    ]
    for row in rows:
        cells = [row["name"]]
        cells += [format_figure(row["figures"].get(name, "")) for name in columns]
        cells.append(format_figure(row["peak_gib"]) if row["peak_gib"] is not None else "")
        state = "" if row["state"] == "ok" else f"**{row['state']}** "
        cells.append(f"{state}{row['note']}".strip())
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return [*lines, ""]
