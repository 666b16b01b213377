"""Execute the cells of a notebook in one process, and print what each shows.

    python run_notebook.py NOTEBOOK.ipynb

The value of a cell's last line is printed too, as a notebook shows it. Jupyter is not needed.
"""

import ast
import json
import sys
from pathlib import Path


def run_cells(path: Path) -> None:
    """Execute the code cells in order, in one namespace."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
            if value is not None:
                print(f"[{number}] {value!r}")


if __name__ == "__main__":
    run_cells(Path(sys.argv[1]))
