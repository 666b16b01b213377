"""The Python and YAML of the pages: programs compile, their imports exist, configs can be read."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from places import REPOSITORY

PAGES = [
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    REPOSITORY / "tools" / "documentation" / "api_page.py",
]


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def missing_imports(program: str) -> list[str]:
    """The names that a program imports from the package and that are not there."""
    missing = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "megatron_chameleon"
        ):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    missing.append(f"{node.module}.{alias.name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_programs_compile_and_import_what_exists(page: Path) -> None:
    for program in blocks(page, "python"):
        compile(program, str(page), "exec")
        assert missing_imports(program) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_yaml_can_be_read(page: Path) -> None:
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)


def test_a_missing_name_is_found() -> None:
    program = "from megatron_chameleon import Session, Sesion\nfrom os import nothing"
    assert missing_imports(program) == ["megatron_chameleon.Sesion"]


def test_there_are_snippets_to_look_at() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) > 4
    assert sum(len(blocks(page, "yaml")) for page in PAGES) > 10
