"""What a terminal would obey is shown, not sent."""

import sys
import unicodedata

from megatron_chameleon.terminal import escape_line, escape_text


def test_every_character_that_is_not_seen_is_escaped() -> None:
    """By Unicode's categories; the two joiners are parts of emoji and of several scripts."""
    unsafe = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        if unicodedata.category(letter) in unsafe and letter not in "\u200c\u200d":
            assert escape_line(letter).startswith("\\") and escape_line(letter).isascii()
        elif unicodedata.category(letter) not in {"Cn"}:
            assert escape_line(letter) == letter


def test_a_line_and_a_text() -> None:
    text = "\x1b]0;title\x07 a\r\nb\tc \u202egpj.exe \x9b2J \ud800"
    assert escape_line(text) == r"\x1b]0;title\x07 a\r\nb\tc \u202egpj.exe \x9b2J \ud800"
    assert escape_text(text) == "\\x1b]0;title\\x07 a\\r\nb\tc \\u202egpj.exe \\x9b2J \\ud800"
    assert escape_line("é 漢字 👩\u200d🚀") == "é 漢字 👩\u200d🚀"
