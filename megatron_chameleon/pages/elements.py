"""Pieces of a page. Arguments are plain text, which is escaped, except where they are called
``content`` or ``contents``: those are HTML."""

import base64
import html
import io
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


def table(heads: Sequence[str | Cell], rows: Iterable[Sequence[object]], label: str = "") -> str:
    """A table that scrolls inside its own box.

    Args:
        heads: A head gives the kind of its column's cells.
        rows: Texts or cells, as many as there are heads.
        label: What it shows, for readers who do not see it.
    """
    columns = [head if isinstance(head, Cell) else Cell(head) for head in heads]
    first = "".join(
        Cell(column.text, "n" if column.kind == "n" else "").html("th" if column.text else "td")
        for column in columns
    )
    lines = []
    for row in rows:
        cells = (
            value if isinstance(value, Cell) else Cell(value, column.kind)
            for value, column in zip(row, columns, strict=True)
        )
        lines.append(f"<tr>{''.join(cell.html() for cell in cells)}</tr>")
    body = "\n".join(lines)
    named = f'role="region" aria-label="{escape(label)}" ' if label else ""
    return (
        f'<div class="scroll" {named}tabindex="0"><table><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    """A text as it is; long lines scroll inside their box, also by the keyboard."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def bar(share: float) -> str:
    """A bar as long as a share, in [0, 1], of the cell around it."""
    share = min(max(share, 0.0), 1.0)
    return f'<span class="share" style="width:{100 * share:.1f}%"></span>'


def stripes(parts: Sequence[tuple[int, float]], alt: str) -> str:
    """A strip of coloured parts.

    Args:
        parts: The number of a colour, from 0 to 3, and a share of the width.
        alt: What it shows.
    """
    drawn = "".join(f'<i class="k{kind}" style="width:{100 * s:.3f}%"></i>' for kind, s in parts)
    return f'<div class="stripes" role="img" aria-label="{escape(alt)}">{drawn}</div>'


def stripe_key(names: Sequence[str]) -> str:
    """What the colours of ``stripes`` mean, in their order."""
    found = (f'<span><i class="k{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="key">{"".join(found)}</p>'


def sample(content: str, caption: str = "", kind: str = "") -> str:
    """One of ``samples``: HTML, and a line that says what it is.

    Args:
        content: What is shown.
        caption: Plain text above it, such as a step.
        kind: right, wrong or empty.
    """
    mark = f' class="{kind}"' if kind else ""
    head = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{mark}>{head}{content}</figure>"


def samples(contents: Iterable[str], is_wide: bool = False) -> str:
    """Boxes side by side, as many as the width allows; each is made by ``sample``."""
    kind = "samples wide" if is_wide else "samples"
    return f'<div class="{kind}">{"".join(contents)}</div>'


def image(data: bytes, alt: str) -> str:
    """An image inside the page, which keeps its place free until it is drawn.

    Args:
        data: Its file, PNG or JPEG, written by this program.
        alt: What it shows.
    """
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    source = base64.b64encode(data).decode("ascii")
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:  # reads the head alone
        width, height = opened.size
    size = f'width="{width}" height="{height}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/{kind};base64,{source}">'


def choice(name: str, views: Sequence[tuple[str, str]], label: str = "Axes") -> str:
    """Several views of the same thing, of which the reader chooses one; no script is needed.

    Args:
        name: Unique on the page, of letters, digits and dashes.
        views: Up to three, each a label and HTML; the first one is shown.
        label: What the reader chooses, for readers who do not see it.
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
    return (
        f'<div class="choice" role="group" aria-label="{escape(label)}">'
        f"{''.join(buttons)}{''.join(contents)}</div>"
    )
