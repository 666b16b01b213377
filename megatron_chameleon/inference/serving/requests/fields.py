"""Reads the fields of a JSON object by their types, and knows which ones nobody reads."""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad
from megatron_chameleon.wording import shown


class Fields:
    """One object of a request. A field that is null counts as missing, as OpenAI's do.

    Args:
        values: The object.
        path: Where it stands in the request, such as ``messages[0].``; empty for the request.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values, self.path = values, path
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value as it is; None if it is missing."""
        self._read.add(name)
        return self._values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, f"{shown(value)} is not true or false", "Use true or false")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number, which may be written as 5.0; None if it is missing."""
        value = self.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if not is_number or not isinstance(value, int) or not low <= value <= high:
            words = f"a whole number between {low:,} and {high:,}"
            raise self.wrong(name, f"{shown(value)} is not {words}", f"Use {words}")
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number; None if it is missing.

        Args:
            name: Of the field.
            low: The least value.
            high: The largest value.
            above: Whether ``low`` itself is refused.
        """
        value = self.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):
            words = f"a number above {low:g} and" if above else f"a number between {low:g} and"
            words += f" at most {high:g}" if above else f" {high:g}"
            raise self.wrong(name, f"{shown(value)} is not {words}", f"Use {words}")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, f"{_kind(value)} is not a string", "Send a string")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            words = " or ".join(f'"{choice}"' for choice in choices)
            raise self.wrong(name, f"{shown(value)} is not {words}", f"Use {words}")
        return value

    def object(self, name: str) -> "Fields | None":
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, f"{_kind(value)} is not an object", "Send an object")
        return Fields(value, f"{self.path}{name}.")

    def wrong(self, name: str, what: str, remedy: str, code: str | None = None) -> Refusal:
        """The refusal of a field."""
        return bad(self.path + name, what, remedy, code)

    def refuse_rest(self, ignored: Collection[str], known: Collection[str] = ()) -> None:
        """Refuse fields that nobody has read: a misspelled option would be left out silently.

        Args:
            ignored: Fields that change nothing.
            known: More fields whose names are suggested.
        """
        for name, value in self._values.items():
            if name in self._read or name in ignored or value is None:
                continue
            near = difflib.get_close_matches(name[:100], [*self._read, *known], 1)
            remedy = f"Did you mean {near[0]}?" if near else "Leave it out"
            raise bad(self.path + _name(name), "this field is not known", remedy)


def _kind(value: Any) -> str:
    """A value as a sentence names it; containers are not written out."""
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else shown(value)


def _name(name: str) -> str:
    short = name[:60]
    return short if short.isprintable() and short else shown(short)
