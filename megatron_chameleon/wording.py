"""Values in sentences: durations, sizes, nouns that follow a count, values of any length.

Also which of many things people are shown.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_LONGEST_VALUE = 60


def format_duration(seconds: float) -> str:
    """A duration of two units at most, rounded to the second: 12s, 3m05s, 2h07m or 4d03h.

    >>> format_duration(185)
    '3m05s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A count and its noun, which takes the ending in the plural.

    >>> counted(1, "answer"), counted(2300, "document"), counted(2, "batch", "es")
    ('1 answer', '2,300 documents', '2 batches')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


def format_count(count: int) -> str:
    """A number that may be huge, in three digits and the largest unit of which there is one.

    >>> format_count(9_170_000_000_000), format_count(40_960), format_count(7)
    ('9.17T', '41.0k', '7')
    """
    if count < 1000:
        return str(count)
    value, power = float(count), 0
    while value >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}{('', 'k', 'M', 'B', 'T')[power]}"


def format_bytes(count: float) -> str:
    """A number of bytes in the largest unit of which there is at least one.

    >>> format_bytes(4.2e15), format_bytes(24 * 2**30), format_bytes(100)
    ('3.7 PiB', '24.0 GiB', '100 B')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:,.1f} {units[power]}" if power else f"{count:.0f} B"


def shown(value: Any) -> str:
    """A value as Python writes it, cut after some 60 characters.

    A message stays one line of a readable length, whatever a user wrote.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... (1,000 characters)"
    """
    if isinstance(value, int) and value.bit_length() > 4000:  # Python refuses to write these out
        return f"a number of about {int(value.bit_length() * 0.30103):,} digits"
    if isinstance(value, str):  # before repr makes it longer
        text = repr(value[: _LONGEST_VALUE + 1])
        length = len(value)
    else:
        text = repr(value)
        length = len(text)
    if len(text) <= _LONGEST_VALUE + 2:
        return text
    return f"{text[:_LONGEST_VALUE]}... ({length:,} characters)"


def cut(text: str) -> str:
    """A text that stands without quotation marks in a message, cut after some 60 characters.

    >>> cut("model.num_layers=3")
    'model.num_layers=3'
    """
    if len(text) <= 2 * _LONGEST_VALUE and text.isprintable():
        return text
    return shown(text)


def at_even_distances(items: Sequence[T], most: int) -> list[T]:
    """At most so many, the first and the last among them; of one, the first.

    >>> at_even_distances("abcdefg", 3), at_even_distances("ab", 3)
    (['a', 'd', 'g'], ['a', 'b'])
    """
    if len(items) <= most:
        return list(items)
    last, gaps = len(items) - 1, max(most - 1, 1)
    return [items[round(number * last / gaps)] for number in range(most)]
