r"""The safety list: words, phrases, expressions and hashes of pictures that drop a document.

One entry per line; ``#`` begins a comment line:

    slur                     a word, or several in a row; punctuation between them does not count
    re: \bcredit\s*card\b    a regular expression
    sha256: 3a7bd3...        the SHA-256 of a picture's file
    pixels: 77af77...        the SHA-256 of a picture's pixels (``images/pixels.py``), in any file
    phash: c3d4e1f0a5b69788  a perceptual hash of imagehash; 4 bits may differ

Texts and entries are compared after Unicode's NFKC, without characters that nobody sees, and in
lower case unless ``case`` is set, so that neither "ＷＯＲＤ" nor a zero-width space hides a word.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import regex

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.files import read_text
from megatron_chameleon.wording import shown

PHASH_BITS = 4
"""Bits of a listed perceptual hash that may differ."""
MOST_ENTRIES = 1_000_000
EXPRESSION_SECONDS = 10
"""Time that one expression may take for one text."""
_WORD = re.compile(r"\w+")
_PREFIX = re.compile(r"(re|sha256|pixels|phash):\s*(.*)")
_HASH_LENGTH = {"sha256": 64, "pixels": 64, "phash": 16}
_INVISIBLE = dict.fromkeys(
    [
        0xAD,
        0x34F,
        0x61C,
        0x180E,
        0xFEFF,
        *range(0x200B, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2070),
        *range(0xFE00, 0xFE10),
    ]
)


def normalized(text: str, case: bool = False) -> str:
    """A text as it is compared: NFKC, without invisible characters, in lower case.

    >>> normalized("ＢＡＤ\\u200bWord")
    'badword'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE)
    return text if case else text.casefold()


@dataclass
class Blocklist:
    """The entries of all lists."""

    parts_of_words: bool = False
    case: bool = False
    entries: list[str] = field(default_factory=list)
    """The lines, for reports."""
    _phrases: dict[str, list[tuple[tuple[str, ...], int]]] = field(default_factory=dict)
    """First word -> the words of each phrase and its entry."""
    _parts: list[tuple[str, int]] = field(default_factory=list)
    _expressions: list[tuple["regex.Pattern[str]", int]] = field(default_factory=list)
    _hashes: dict[str, dict[str, int]] = field(default_factory=dict)
    _phashes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Sequence[str], parts_of_words: bool, case: bool) -> "Blocklist":
        """Read lists.

        Raises:
            ConfigError: A file cannot be read, or a line is wrong.
        """
        found = cls(parts_of_words, case)
        for path in paths:
            for number, line in enumerate(read_text(path, ConfigError).splitlines(), start=1):
                entry = line.removeprefix("\ufeff").strip() if number == 1 else line.strip()
                if entry and not entry.startswith("#"):
                    found._add(entry, f"{path}:{number}")
            if len(found.entries) > MOST_ENTRIES:
                what = f"has more than {MOST_ENTRIES:,} entries"
                raise ConfigError(path, what, "Use a shorter list")
        if paths and not found.entries:
            raise ConfigError(paths[0], "has no entry", "Write one word or phrase per line")
        return found

    @property
    def has_pictures(self) -> bool:
        return bool(self._hashes or self._phashes)

    @property
    def needs_pixels(self) -> bool:
        """Whether pictures must be decoded and hashed."""
        return "pixels" in self._hashes or bool(self._phashes)

    def _add(self, entry: str, where: str) -> None:
        number = len(self.entries)
        match = _PREFIX.fullmatch(entry)
        if match is None:
            self._add_words(entry, number, where)
        elif match[1] == "re":
            flags = 0 if self.case else regex.IGNORECASE
            try:
                pattern = regex.compile(match[2], flags)
            except (regex.error, RecursionError) as error:
                what = f"{shown(match[2])} is not a regular expression ({error})"
                raise ConfigError(where, what, "Correct or remove it") from error
            if not match[2] or pattern.search(""):
                what = f"the expression {shown(match[2])} matches an empty text, so every document"
                raise ConfigError(where, what, "Correct or remove it")
            self._expressions.append((pattern, number))
        else:
            value, length = match[2].lower(), _HASH_LENGTH[match[1]]
            if not re.fullmatch(r"[0-9a-f]+", value) or len(value) != length:
                what = f"{match[1]} takes {length} hexadecimal digits, not {shown(match[2])}"
                raise ConfigError(where, what, "Correct or remove it")
            if match[1] == "phash":
                self._phashes.append((int(value, 16), number))
            else:
                self._hashes.setdefault(match[1], {}).setdefault(value, number)
        self.entries.append(entry)

    def _add_words(self, entry: str, number: int, where: str) -> None:
        text = normalized(entry, self.case)
        words = tuple(_WORD.findall(text))
        if not words:
            what = f"{shown(entry)} has no letter or digit"
            raise ConfigError(where, what, "Write it as an expression, with re: before it")
        if self.parts_of_words:
            self._parts.append((" ".join(words), number))
        else:
            self._phrases.setdefault(words[0], []).append((words, number))

    def in_text(self, text: str, where: str) -> int:
        """The entry that a text has, the first one of the list; -1 if it has none.

        Raises:
            DataError: An expression took longer than ``EXPRESSION_SECONDS``.
        """
        plain = normalized(text, self.case)
        found = []
        if self._phrases or self._parts:
            words = _WORD.findall(plain)
            found = self._in_words(words) if self._phrases else []
            if self._parts:
                joined = " ".join(words)
                found += [number for part, number in self._parts if part in joined]
        for pattern, number in self._expressions:
            try:
                if pattern.search(plain, timeout=EXPRESSION_SECONDS):
                    found.append(number)
            except TimeoutError as error:
                what = f"the expression {shown(pattern.pattern)} of --blocklist took longer than "
                what += f"{EXPRESSION_SECONDS} seconds for this document"
                raise DataError(where, what, "Write it without nested repetitions") from error
        return min(found, default=-1)

    def _in_words(self, words: list[str]) -> list[int]:
        found = []
        for place, word in enumerate(words):
            for phrase, number in self._phrases.get(word, ()):
                if len(phrase) == 1 or tuple(words[place : place + len(phrase)]) == phrase:
                    found.append(number)
        return found

    def in_picture(self, file_hash: str, pixel_hash: str, phash: int | None) -> int:
        """The entry that a picture is, the first one of the list; -1 if it is none.

        Args:
            file_hash: SHA-256 of its file, in hexadecimal digits.
            pixel_hash: SHA-256 of its pixels; empty if not known.
            phash: Its perceptual hash; None if not known, or if it has one colour only.
        """
        found = [self._hashes.get("sha256", {}).get(file_hash, -1)]
        found.append(self._hashes.get("pixels", {}).get(pixel_hash, -1))
        if phash is not None:
            found += [n for value, n in self._phashes if (value ^ phash).bit_count() <= PHASH_BITS]
        return min((number for number in found if number >= 0), default=-1)
