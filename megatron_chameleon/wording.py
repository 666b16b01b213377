"""Numbers in sentences: durations, and nouns that follow a count."""


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


def counted(count: int, noun: str) -> str:
    """A count and its noun, which takes an s in the plural.

    >>> counted(1, "answer"), counted(2300, "document")
    ('1 answer', '2,300 documents')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
