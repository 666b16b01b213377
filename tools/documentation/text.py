"""Text of docstrings and help as Markdown."""

import re
import textwrap


def prose(text: str) -> str:
    """A docstring as Markdown: ``x`` becomes `x`; what looks like Markdown outside of it does not.

    Angle brackets, stars and underscores of identifiers stay what they are.
    """
    text = text.replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([\\*_<>\[\]|#])", r"\\\1", text)


def code(text: str) -> str:
    """An inline code span, also of a text with backticks."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def block(text: str, language: str = "") -> str:
    """A fenced code block, also of a text that has fences."""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def indented(text: str) -> str:
    """Four spaces before each line, as a definition's body needs them."""
    return textwrap.indent(text, "    ")
