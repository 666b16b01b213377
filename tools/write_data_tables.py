"""Write the tables of docs/data.md that are made from the readers' registries.

    python tools/write_data_tables.py

A test fails when they are not current.
"""

import re
from pathlib import Path

from megatron_chameleon.data.documents.shapes import form_table
from megatron_chameleon.data.inputs.files import kind_table

GUIDE = Path(__file__).parents[1] / "docs" / "data.md"
TABLES = {"kinds of file": kind_table, "forms": form_table}


def with_tables(text: str) -> str:
    """The guide with its tables made anew, each between two comments of its name."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: tools/write_data_tables.py -->\n", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text, count = pattern.subn(lambda _: f"{begin}\n{make()}\n{end}", text)  # noqa: B023
        if count != 1:
            raise ValueError(f"{GUIDE} has {count} tables of {name}, not 1")
    return text


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
