"""Which modules of the package import which, read from their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

from places import REPOSITORY

PACKAGE = "megatron_chameleon"


def modules() -> dict[str, Path]:
    root = REPOSITORY / PACKAGE
    return {
        ".".join([PACKAGE, *path.relative_to(root).with_suffix("").parts]): path
        for path in root.rglob("*.py")
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports anywhere, in its functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)):
                if name in known:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def folder(path: Path) -> str:
    place = path.parent.relative_to(REPOSITORY / PACKAGE).as_posix()
    return "" if place == "." else place


def cycle(graph: dict) -> list | None:
    """The first circle of a graph, found depth first."""
    done: set = set()

    def visit(node, path: list) -> list | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in graph.get(node, ()):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in graph if (found := visit(node, []))), None)
