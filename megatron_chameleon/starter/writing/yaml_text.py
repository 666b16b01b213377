"""YAML with a comment above each key, which a dumper would not write."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """A key with its value and what a reader should know of it."""

    key: str
    value: object
    meaning: str = ""
    """What the key does."""
    why: str = ""
    """Why it has this value here."""
    raw: str = ""
    """Lines that stand for the value, such as a list of sources."""


def scalar(value: object) -> str:
    """A value in YAML on one line. JSON is YAML; numbers are written as people do."""
    if isinstance(value, float):
        text = f"{value:g}"
        mantissa, mark, power = text.partition("e")
        if not mark:
            return text if "." in text else f"{text}.0"
        return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{int(power)}"
    return json.dumps(value, ensure_ascii=False)


def section(name: str, entries: Sequence[Entry], meaning: str = "") -> str:
    """A section of the file."""
    lines = ["", *comment(meaning), f"{name}:"]
    for entry in entries:
        lines += comment(entry.meaning, "  ")
        lines += comment(f"Here: {entry.why}." if entry.why else "", "  ")
        if entry.raw:
            lines += [f"  {entry.key}:", textwrap.indent(entry.raw.rstrip(), "    ")]
        else:
            lines.append(f"  {entry.key}: {scalar(entry.value)}")
    return "\n".join(lines) + "\n"


def comment(text: str, indent: str = "") -> list[str]:
    """Lines of a comment; none for an empty text."""
    width = WIDTH - len(indent) - 2
    return [f"{indent}# {line}" for line in textwrap.wrap(text, width)]
