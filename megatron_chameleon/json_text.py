"""Parses JSON that somebody else wrote, so that whatever it holds is one error at most."""

import json
from typing import Any

from megatron_chameleon.errors import ChameleonError, DataError

LARGEST_DEPTH = 64
"""Nesting of JSON objects and lists; deeper values make recursive code fail."""


def parse_json(text: str, where: str, kind: type[ChameleonError] = DataError) -> Any:
    """Parse JSON of an outsider.

    Args:
        text: The JSON.
        where: The file, or the line of a file, that an error names.
        kind: The class of the error.

    Raises:
        ChameleonError: Of the given kind: it is not JSON, or nested deeper than ``LARGEST_DEPTH``.
    """
    remedy = "Restore the file, or write it again"
    try:
        return load_json(text, LARGEST_DEPTH)
    except TooDeepError as error:
        raise kind(where, f"has JSON values {error}", remedy) from error
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise kind(where, f"is not valid JSON ({problem})", remedy) from error


class TooDeepError(Exception):
    """JSON is nested deeper than it may be; its text says so."""


def load_json(text: str, deepest: int, **hooks: Any) -> Any:
    """Parse JSON within a number of levels.

    Args:
        text: The JSON.
        deepest: The largest depth of nesting.
        hooks: Of ``json.loads``.

    Raises:
        TooDeepError: It is nested deeper.
        ValueError: It is not JSON.
    """
    try:
        value = json.loads(text, **hooks)
    except RecursionError as error:
        raise TooDeepError(f"nested deeper than {deepest} levels") from error
    if nesting(value, deepest) > deepest:
        raise TooDeepError(f"nested deeper than {deepest} levels")
    return value


def nesting(value: Any, limit: int = LARGEST_DEPTH) -> int:
    """Levels of nesting, found without recursion; it stops at one above the limit."""
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level and depth <= limit:
        depth += 1
        entries = (c.values() if isinstance(c, dict) else c for c in level)
        level = [e for container in entries for e in container if isinstance(e, dict | list)]
    return depth
