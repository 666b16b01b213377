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
        value = json.loads(text)
    except RecursionError:
        value = None
        depth = LARGEST_DEPTH + 1
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise kind(where, f"is not valid JSON ({problem})", remedy) from error
    else:
        depth = nesting(value)
    if depth > LARGEST_DEPTH:
        what = f"has JSON values nested deeper than {LARGEST_DEPTH} levels"
        raise kind(where, what, remedy)
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
