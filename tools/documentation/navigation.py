"""The site's config: ``mkdocs.yml`` with a page for each verb, and tutorials it does not name."""

from collections.abc import Iterator
from typing import Any

import yaml

from megatron_chameleon.cli.main import VERBS
from tools.documentation.staging import REPOSITORY, generated_pages, page_of

COMMANDS = "reference/cli/index.md"


def site_config() -> dict[str, Any]:
    """What Zensical reads.

    Raises:
        ValueError: A page is in no place of the navigation, or a place has no page.
    """
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    config["nav"] = [_with_verbs(entry) for entry in config["nav"]]
    there = {page for page in (*page_of().values(), *generated_pages()) if page.endswith(".md")}
    _add_tutorials(config["nav"], there)
    placed = list(pages_in(config["nav"]))
    if missing := sorted(there - set(placed)):
        raise ValueError(f"mkdocs.yml has no place in `nav` for {', '.join(missing)}")
    if unknown := sorted(set(placed) - there):
        raise ValueError(f"mkdocs.yml names pages that do not exist: {', '.join(unknown)}")
    return config


def _add_tutorials(nav: list[dict[str, Any]], there: set[str]) -> None:
    """Tutorials without a place come first among the tutorials, under their own titles."""
    (tutorials,) = (entry["Tutorials"] for entry in nav if "Tutorials" in entry)
    new = {page for page in there if page.startswith("tutorials/")} - set(pages_in(tutorials))
    for page in sorted(new, reverse=True):
        text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        tutorials.insert(0, {text.splitlines()[0].removeprefix("# "): page})


def pages_in(entry: Any) -> Iterator[str]:
    """The pages of a part of the navigation, in order."""
    if isinstance(entry, str):
        yield entry
    for inner in (
        entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    ):
        yield from pages_in(inner)


def names_in(entry: Any) -> Iterator[tuple[str, str]]:
    """Each page of a part of the navigation with its name there."""
    for inner in entry if isinstance(entry, list) else [entry]:
        for name, value in inner.items() if isinstance(inner, dict) else ():
            yield from [(value, name)] if isinstance(value, str) else names_in(value)


def _with_verbs(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_with_verbs(inner) for inner in entry]
    if isinstance(entry, dict):
        return {name: _with_verbs(inner) for name, inner in entry.items()}
    if entry == COMMANDS:
        return [COMMANDS, *({verb: f"reference/cli/{verb}.md"} for verb in VERBS)]
    return entry
