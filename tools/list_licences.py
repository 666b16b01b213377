"""List the direct dependencies of setup.py with their licences, as docs/licences.md has them.

    python tools/list_licences.py              # print the table
    python tools/list_licences.py --write      # put it into docs/licences.md

The licences are those that the installed packages state. ``STATED_ELSEWHERE`` has those that state
none in their metadata, or are not installed here.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "licences.md"
STATED_ELSEWHERE = {
    "axe-playwright-python": "MIT; axe-core in it: MPL-2.0",
    "pycocoevalcap": "BSD-2-Clause",
    "transformer-engine": "Apache-2.0",
    "matplotlib": "PSF-based (matplotlib's own)",
    "scikit-image": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "mpich": "MPICH (permissive)",
    "megatron-core": "Apache-2.0 and BSD-3-Clause",
    "vllm": "Apache-2.0",
    "zensical": "MIT",
    "mkdocstrings-python": "ISC",
}
"""Read in the project's repository."""


def requirements() -> dict[str, set[str]]:
    """The direct dependencies of setup.py, and which extras they belong to ("" for all users)."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    call = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    values = {word.arg: word.value for word in call.keywords}
    groups = {"": ast.literal_eval(values["install_requires"])}
    groups |= ast.literal_eval(values["extras_require"])
    found: dict[str, set[str]] = {}
    for extra, lines in groups.items():
        for line in lines:
            name = re.match(r"[A-Za-z0-9._\-]+", line)
            assert name is not None
            found.setdefault(name[0].lower(), set()).add(extra)
    return found


def licence(name: str) -> str | None:
    """The licence that an installed package states; None if it is unknown."""
    if name in STATED_ELSEWHERE:
        return STATED_ELSEWHERE[name]
    try:
        package = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    found = package.json
    classifiers = [
        line.rsplit(" :: ", 1)[1]
        for line in found.get("classifier", ())
        if line.startswith("License :: OSI Approved :: ")
    ]
    lines = str(found.get("license", "")).splitlines()
    stated = lines[0] if lines else ", ".join(classifiers)
    return str(found.get("license_expression", stated)) or None


def rows() -> Iterator[str]:
    """The lines of the table."""
    yield "| package | licence | needed for |"
    yield "|---|---|---|"
    for name, extras in sorted(requirements().items()):
        use = (
            "everything" if "" in extras else ", ".join(f"`[{extra}]`" for extra in sorted(extras))
        )
        yield f"| {name} | {licence(name) or 'unknown'} | {use} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    table = "\n".join(rows())
    if not parser.parse_args().write:
        print(table)
        return
    text = PAGE.read_text(encoding="utf-8")
    new = re.sub(r"(?ms)^\| package.*?(?=\n\n)", lambda _: table, text)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
