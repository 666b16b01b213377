"""Make texts that come from files safe to show: on a terminal, in a log line or in a table.

A document's id, a file name or a caption may contain characters that a terminal obeys: ESC moves
the cursor, changes the title or fills the clipboard, a carriage return hides what was printed
before, and U+202E turns the text around. They are shown as Python would write them in a string,
such as ``\\x1b``.
"""

import re

# All of Unicode's categories Cc, Cf, Cs, Zl and Zp. The joiners U+200C and U+200D are left out,
# because emoji and several scripts need them.
_UNSAFE = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
_IN_LINE = re.compile(f"[{_UNSAFE}]")
_IN_TEXT = re.compile(f"(?![\\n\\t])[{_UNSAFE}]")


def escape_line(text: object) -> str:
    r"""A value as part of one line: without line breaks and what a terminal would obey.

    >>> print(escape_line("a\x1b[2Jb\nerror: c"))
    a\x1b[2Jb\nerror: c
    """
    return _IN_LINE.sub(_escape, str(text))


def escape_text(text: str) -> str:
    r"""A text of several lines, such as a table: like ``escape_line``, but \n and \t stay."""
    return _IN_TEXT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")
