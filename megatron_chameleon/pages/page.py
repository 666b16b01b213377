"""The page around a body: its head, its title, and where it comes from.

    page("Digits", body, Origin("chameleon report runs/digits", now, "digits", seed=1))

A page loads nothing. Scripts run only where a page brings one, and then this one alone: the policy
of the page names its hash.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from megatron_chameleon import __version__
from megatron_chameleon.masking import mask_secrets
from megatron_chameleon.pages.elements import escape
from megatron_chameleon.pages.style import STYLE

_LONGEST_TITLE = 300
_LONGEST_FACT = 2000


@dataclass(frozen=True)
class Origin:
    """Where a page comes from; all of it stands below the title."""

    command: str
    """What has written the page, as a shell would read it; ``masked_command`` gives it."""
    date: datetime
    """When it was written, with a time zone."""
    name: str = ""
    """Of the run, file or model that the page is about."""
    seed: int | None = None
    """Of what was drawn for the page or in its run; None if nothing was drawn."""
    more: Sequence[tuple[str, str]] = ()
    """Further names and texts."""

    def facts(self) -> list[tuple[str, str]]:
        """Names and texts, in the order in which they are shown."""
        date = self.date.astimezone(UTC)
        found = [("about", self.name), *self.more]
        found += [] if self.seed is None else [("seed", str(self.seed))]
        return [*found, ("written", f"{date:%Y-%m-%d %H:%M} UTC"), ("command", self.command)]


def page(
    title: str, body: Iterable[str], origin: Origin, *, style: str = "", script: str = ""
) -> str:
    """A whole HTML page. It begins with its title as a heading of level 1.

    Args:
        title: Plain text; it is escaped.
        body: HTML below the title.
        origin: Where the page comes from.
        style: Rules of this page in addition.
        script: The JavaScript of the page; empty for a page that needs none. It must not contain
            ``</script``.
    """
    name = cut(title, _LONGEST_TITLE)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        f'<meta name="referrer" content="no-referrer"><title>{escape(name)}</title>'
        f"<style>{STYLE}{style}</style>"
    )
    content = "\n".join(part for part in body if part)
    ending = f"<script>{script}</script>\n" if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        f"<header><h1>{escape(name)}</h1>{_origin(origin)}</header>\n<main>\n{content}\n</main>\n"
        f"<footer>Written by megatron_chameleon {escape(__version__)}.</footer>\n{ending}"
        "</body></html>\n"
    )


def cut(text: str, most: int) -> str:
    """A text of at most so many characters, which ends with an ellipsis if it was longer."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _origin(origin: Origin) -> str:
    rows = []
    for name, text in origin.facts():
        shown = escape(cut(mask_secrets(text), _LONGEST_FACT))
        content = f"<code>{shown}</code>" if name == "command" else shown
        rows.append(f"<div><dt>{escape(name)}</dt><dd>{content}</dd></div>")
    return f'<dl class="origin">{"".join(rows)}</dl>'


def _policy(script: str) -> str:
    """Content security policy: nothing is loaded, and no script runs but the page's own."""
    assert "</script" not in script.lower()
    allowed = ""
    if script:
        digest = hashlib.sha256(script.encode()).digest()
        allowed = f"script-src 'sha256-{base64.b64encode(digest).decode()}'; "
    return (
        f"default-src 'none'; {allowed}img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )
