"""Which folder may import which, and how large a file, a function and a folder may grow.

The import rules are in tests/support/tables/import_rules.py; docs/architecture.md draws them.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest
from import_rules import FOR_ALL, MAY_IMPORT
from package_imports import PACKAGE, cycle, folder, imported, modules

from places import REPOSITORY

FREE = {"", "cli"}

MOST_LINES_PER_FILE = 450
MOST_LINES_PER_FUNCTION = 60
MOST_FILES_PER_FOLDER = 12
CODE = (PACKAGE, "tools", "examples", "benchmarks", "tests")


@pytest.fixture(scope="module")
def arrows() -> dict[Path, set[Path]]:
    known = modules()
    return {path: {known[name] for name in imported(path, known)} for path in known.values()}


def test_folders_import_only_what_they_may(arrows: dict[Path, set[Path]]) -> None:
    broken = [
        f"{source.relative_to(REPOSITORY)} imports {target.relative_to(REPOSITORY)}"
        for source, targets in arrows.items()
        for target in targets
        if folder(source) not in FREE
        and folder(target) not in MAY_IMPORT[folder(source)] | {folder(source)}
        and target.name not in FOR_ALL
    ]
    assert broken == []


def test_every_folder_has_a_rule_and_no_rule_is_left_over(arrows: dict[Path, set[Path]]) -> None:
    assert {folder(path) for path in arrows} - FREE == MAY_IMPORT.keys()
    used = {(folder(s), folder(t)) for s, targets in arrows.items() for t in targets}
    unused = [(s, t) for s, targets in MAY_IMPORT.items() for t in targets if (s, t) not in used]
    assert unused == []


def test_no_folders_and_no_files_import_each_other(arrows: dict[Path, set[Path]]) -> None:
    assert cycle(arrows) is None
    between: dict[str, set[str]] = {}
    for source, targets in arrows.items():
        if folder(source) not in FREE and source.name != "__init__.py":
            found = {folder(t) for t in targets if t.name != "__init__.py"} - FREE
            between.setdefault(folder(source), set()).update(found - {folder(source)})
    assert cycle(between) is None


def code_files() -> list[Path]:
    return sorted(path for folder in CODE for path in (REPOSITORY / folder).rglob("*.py"))


def test_no_file_is_too_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in code_files()}
    assert {path for path, count in lines.items() if count > MOST_LINES_PER_FILE} == set()


def test_no_function_is_too_long() -> None:
    functions = [
        (path, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for path in code_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 1000
    assert [found for found in functions if found[2] > MOST_LINES_PER_FUNCTION] == []


def test_no_folder_is_too_wide() -> None:
    """One file per verb in ``cli`` and one test file per verb beside it may be more."""
    counts = Counter(path.parent for path in code_files())
    assert {
        folder: count
        for folder, count in counts.items()
        if count > MOST_FILES_PER_FOLDER and folder.name != "cli"
    } == {}


def test_a_circle_is_found() -> None:
    assert cycle({1: {2}, 2: {3}, 3: {2}}) == [2, 3, 2]
    assert cycle({1: {2, 3}, 2: {3}, 3: set()}) is None
