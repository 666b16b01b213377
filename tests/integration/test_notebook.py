"""The notebook of the digits runs from its first cell to its last, on a tiny run."""

import ast
import json
import re
import subprocess
import sys

from places import REPOSITORY
from run_command import environment
from tiny_project import WORDS, TinyProject

NOTEBOOK = REPOSITORY / "examples" / "notebooks" / "digits.ipynb"
PROGRAM = REPOSITORY / "tests" / "support" / "runs" / "run_notebook.py"


def test_all_cells_run(tiny: TinyProject) -> None:
    run = tiny.train("run", "training.steps=4")
    assert run.returncode == 0, run.stderr
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(NOTEBOOK)],
        cwd=NOTEBOOK.parent,  # where Jupyter starts
        env=environment(CHAMELEON_RUN=str(tiny.folder / "run")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert "step 4, 64 tokens of context on cpu" in shown
    assert "mode=RGB size=640x64" in shown  # ten pictures of 16 x 16, four times as large
    assert re.findall(r"^drawn as (\w+) ", shown, re.MULTILINE) == WORDS
    (codes,) = re.findall(r"^codes: (.*)$", shown, re.MULTILINE)
    assert len(ast.literal_eval(codes)) == 16
    losses = re.findall(r"^step \d+: loss (\d+\.\d+)$", shown, re.MULTILINE)
    assert len(losses) == 8 and all(0 < float(loss) < 10 for loss in losses)


def test_no_outputs_are_stored() -> None:
    """They would show an older model than the one that the reader has trained."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
