"""The folder that the site is made from: the guides, the generated pages, and what they link to.

Guides are written for a reader of the repository, so they link to files beside ``docs/``. In the
site, Markdown files such as CHANGELOG.md become pages, and other files become pages that show their
text.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.documentation.api_page import api_pages
from tools.documentation.cli_page import cli_pages
from tools.documentation.config_page import config_pages
from tools.documentation.text import block

REPOSITORY = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Markdown files outside of docs/ and their pages."""
LINK = re.compile(r"(?:(?<=\]\()|(?<=\]: ))([^)\s]+)(?=[)\s]|$)", re.MULTILINE)
"""The target in ``[text](target "title")`` and in ``[text]: target``."""
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".json": "json"}


@dataclass(frozen=True)
class Link:
    """A link of a Markdown file to a file of the repository."""

    written: str
    """As it stands in the text."""
    target: str
    """The path from the repository's root; that of the page itself for ``#anchor``."""
    anchor: str


def generated_pages() -> dict[str, str]:
    """The text of every generated page by its path below ``docs/``."""
    return {
        **{f"reference/{name}.md": text for name, text in config_pages().items()},
        **{f"reference/cli/{name}.md": text for name, text in cli_pages().items()},
        **{f"reference/{name}.md": text for name, text in api_pages().items()},
    }


def stage(folder: Path, names: Mapping[str, str]) -> None:
    """Write everything that the site is made from into an empty folder.

    Args:
        folder: It is emptied first.
        names: What the navigation calls a page of the site.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source, page in page_of().items():
        path = REPOSITORY / source
        if path.suffix != ".md":
            _write(folder / page, path.read_bytes())
            continue
        text = path.read_text(encoding="utf-8")
        _write(folder / page, in_site(source, text, names).encode())
        for link in links_in(source, text):
            if site_path(link.target).startswith("files/"):
                _write(folder / site_path(link.target), _shown_file(link.target).encode())
    for name, text in generated_pages().items():
        _write(folder / name, text.encode())


def page_of() -> dict[str, str]:
    """The files of the repository that are in the site as they are, and their paths there."""
    docs = REPOSITORY / "docs"
    own = sorted(path for path in docs.rglob("*") if path.is_file())
    inside = {f"docs/{name}": name for name in (p.relative_to(docs).as_posix() for p in own)}
    return inside | {name: page for name, page in OUTSIDE.items() if page != "index.md"}


def site_path(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target in OUTSIDE:
        return OUTSIDE[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target.replace('.', '-')}.md"


def links_in(source: str, text: str) -> Iterator[Link]:
    """The links of a Markdown file that do not leave the repository.

    Args:
        source: The file's path from the repository's root.
        text: Its text; code is skipped.
    """
    for written in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", written, re.IGNORECASE):
            continue
        name, _, anchor = written.partition("#")
        yield Link(written, _joined(source, name) if name else source, anchor)


def without_code(text: str) -> str:
    """Markdown without its code blocks and code spans."""
    text = re.sub(r"^(```+|~~~+).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)[^\n]*?\1", "", text)


def in_site(source: str, text: str, names: Mapping[str, str]) -> str:
    """The text of a Markdown file with its links as the site has them.

    A link whose text is the name of a file gets the name that the navigation has for the page.
    """
    place = PurePosixPath(site_path(source)).parent
    for link in set(links_in(source, text)):
        if link.target != source:
            page = site_path(link.target)
            path = _relative(page, place) + (f"#{link.anchor}" if link.anchor else "")
            file = re.escape(PurePosixPath(link.target).name)
            name = names.get(page)
            if name:
                pattern = rf"\[(?:docs/)?{file}\](?=\({re.escape(link.written)}\))"
                text = re.sub(pattern, f"[{name}]", text)
            text = re.sub(
                rf"(\]\(|\]: ){re.escape(link.written)}(?=[)\s]|$)", rf"\g<1>{path}", text
            )
    return text


def _joined(source: str, name: str) -> str:
    parts: list[str] = []
    for part in [*PurePosixPath(source).parent.parts, *PurePosixPath(name).parts]:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return "/".join(parts)


def _relative(path: str, place: PurePosixPath) -> str:
    return "../" * len(place.parts) + path


def _shown_file(target: str) -> str:
    path = REPOSITORY / target
    language = _LANGUAGES.get(path.suffix, "")
    return f"# {target}\n\n{block(path.read_text(encoding='utf-8'), language)}\n"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
