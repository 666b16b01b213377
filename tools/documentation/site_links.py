"""Follow every link, picture and script of a built site: each file and anchor must be there."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif "src" in values or (tag == "link" and values.get("rel") in ("stylesheet", "icon")):
            self.sources.append(values.get("src", values.get("href", "")))


def broken_links(site: Path) -> list[str]:
    """``page.html: target`` of each link and source without a file or an anchor."""
    pages = _pages(site)
    return [
        f"{path.relative_to(site)}: {reference} leads nowhere"
        for path, page in pages.items()
        if path.name != "404.html"  # its links begin at the root of a server
        for reference in dict.fromkeys((*page.links, *page.sources))
        if not _is_there(reference, path, pages)
    ]


def foreign_sources(site: Path) -> list[str]:
    """Scripts, styles, fonts and pictures that a page would fetch from another host."""
    return [
        f"{path.relative_to(site)}: {source} is fetched from another host"
        for path, page in _pages(site).items()
        for source in page.sources
        if urlsplit(source).netloc
    ]


def _pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def _is_there(reference: str, page: Path, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(reference)
    if parts.scheme or parts.netloc:
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors
