"""Pieces of a page. Arguments are plain text, which is escaped, except where they are called
``content`` or ``contents``: those are HTML."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_chameleon.terminal import escape_text


def escape(value: object) -> str:
    r"""A value as text of a page: no markup, and no characters that turn or hide the text around.

    >>> escape("<b>\u202e")
    '&lt;b&gt;\\u202e'
    """
    return html.escape(escape_text(str(value)))


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: object
    kind: str = ""
    """n: a number, aligned right; code; long: a text that may break; empty: any other text."""
    content: str | None = None
    """HTML in place of the text."""

    def html(self, tag: str = "td") -> str:
        kind = f' class="{self.kind}"' if self.kind else ""
        content = escape(self.text) if self.content is None else self.content
        return f"<{tag}{kind}>{content}</{tag}>"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def how(*sentences: str) -> str:
    """A paragraph that explains what is shown."""
    return f'<p class="how">{escape(" ".join(sentences))}</p>'


def notes(texts: Iterable[tuple[str, str]]) -> str:
    """Sentences that matter, each with its kind: warn, bad or empty. Empty if there are none."""
    entries = [
        f'<li class="{kind}">{escape(text)}</li>' if kind else f"<li>{escape(text)}</li>"
        for text, kind in texts
    ]
    return f'<ul class="notes">{"".join(entries)}</ul>' if entries else ""


def cards(numbers: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    boxes = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in numbers
    )
    return f'<div class="numbers">{"".join(boxes)}</div>'


def table(heads: Sequence[str | Cell], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls inside its own box. A head gives the kind of its column's cells."""
    columns = [head if isinstance(head, Cell) else Cell(head) for head in heads]
    first = "".join(
        Cell(column.text, "n" if column.kind == "n" else "").html("th") for column in columns
    )
    lines = []
    for row in rows:
        cells = (
            value if isinstance(value, Cell) else Cell(value, column.kind)
            for value, column in zip(row, columns, strict=True)
        )
        lines.append(f"<tr>{''.join(cell.html() for cell in cells)}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def image(data: bytes, alt: str, kind: str = "png") -> str:
    """An image inside the page.

    Args:
        data: Its file, written by this program.
        alt: What it shows.
        kind: png or jpeg.
    """
    source = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{source}">'


def choice(name: str, views: Sequence[tuple[str, str]]) -> str:
    """Several views of the same thing, of which the reader chooses one; no script is needed.

    Args:
        name: Unique on the page, of letters, digits and dashes.
        views: Up to three, each a label and HTML; the first one is shown.
    """
    buttons, contents = [], []
    for number, (label, content) in enumerate(views):
        checked = " checked" if number == 0 else ""
        key = f"{name}-{number}"
        buttons.append(
            f'<input type="radio" name="{name}" id="{key}"{checked}>'
            f'<label for="{key}">{escape(label)}</label>'
        )
        contents.append(f'<div class="view">{content}</div>')
    return f'<div class="choice">{"".join(buttons)}{"".join(contents)}</div>'
