"""Compares an answer with a reference for ``exact_match`` and ``contains``, in any script.

Case, the form of Unicode characters, white space, Markdown's emphasis and the punctuation around a
sentence do not count. Signs and symbols do: 5, -5, 1.5, $5 and 5% differ, and so do C, C++ and C#.
Nothing is ever removed from a reference until nothing is left, and no word is: "A" stays a letter.

The VQA challenge has a normalisation of its own, which removes articles and most symbols; it is in
``vqa.py`` and only the metric ``accuracy`` uses it.
"""

import re
import unicodedata
from collections.abc import Sequence

_UNSPACED = (
    ("\u0e01", "\u0eff"),  # Thai, Lao
    ("\u1000", "\u109f"),  # Myanmar
    ("\u1780", "\u17ff"),  # Khmer
    ("\u3040", "\u30ff"),  # Japanese syllables
    ("\u3400", "\u9fff"),  # Chinese characters
)
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_QUOTES = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc\u2032"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033"), '"'),
}
_EMPHASIS = re.compile(r"(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1")
_OPENING = "\"'([{\u00ab\u00bf\u00a1\u3008\u300a\u300c\u300e\u3010*_`"
_CLOSING = "\"')]}\u00bb\u3009\u300b\u300d\u300f\u3011*_`"
_STOPS = ".,;:!?\u2026\u3002\u3001\u060c\u061f\u061b\u0964"
_ENDING = _STOPS + _CLOSING
_NEAR = 16
"""Characters around a reference that are looked at."""
_JOINTS = ',;:/|()[]{}"=\u3001\u3002\u060c'
"""Characters between two words that belong to neither, unless digits stand on both sides."""


def fold(text: str) -> str:
    """A text whose case, compatibility forms, white space and emphasis no longer tell it apart.

    Compatibility forms that change a value are written out first: the exponent of x\u00b2 becomes
    ^2 (not 2), and \u00bd becomes 1/2.
    """
    written = "".join(map(_written_out, text))
    for _ in range(2):  # case folding can undo the normal form
        written = unicodedata.normalize("NFKC", written).casefold()
    written = written.translate(_DASHES).translate(_QUOTES).replace("\u2044", "/")
    written = "".join(c for c in written if unicodedata.category(c) != "Cf")
    return _EMPHASIS.sub(r"\2", " ".join(written.split()))


def normalised_reference(reference: str) -> str:
    """A reference as it is compared: folded, without the period that ends a sentence.

    It is empty only if the reference has nothing but white space.
    """
    folded = fold(reference)
    return folded.rstrip(".,;:\u3002").rstrip() or folded


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, apart from the punctuation around it; else 0."""
    folded = fold(answer)
    forms = {folded, folded.rstrip(".,;:\u3002").rstrip(), folded.rstrip(_STOPS).rstrip()}
    forms.add(_unquoted(folded))
    forms.discard("")
    wanted = {normalised_reference(reference) for reference in references}
    wanted |= {fold(reference) for reference in references}
    return float(bool(forms & (wanted - {""})))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains a reference as whole words, with its signs and symbols; else 0."""
    folded = fold(answer)
    return float(any(_stands_in(normalised_reference(r), folded) for r in references))


def _stands_in(wanted: str, text: str) -> bool:
    place = text.find(wanted) if wanted else -1
    while place >= 0:
        end = place + len(wanted)
        if _begins_at(text, place) and _ends_at(text, end):
            return True
        place = text.find(wanted, place + 1)
    return False


def _begins_at(text: str, place: int) -> bool:
    """Whether a word begins at a place: nothing that belongs to it stands before."""
    before = text[max(0, place - _NEAR) : place].rstrip(_OPENING)
    if not before or before[-1].isspace() or _is_alone(text[place]) or _is_alone(before[-1]):
        return True
    if text[place - 1] in _OPENING and not (before[-1].isalnum() or before[-1] in "-+.$\\"):
        return True  # an opening bracket or quote behind punctuation
    return text[place - 1] in _JOINTS and not _between_digits(text, place - 1)


def _ends_at(text: str, place: int) -> bool:
    """Whether a word ends at a place: nothing that belongs to it follows."""
    rest = text[place : place + _NEAR]
    after = rest.lstrip(_ENDING)
    if not after or after[0].isspace() or _is_alone(rest[0]) or _is_alone(text[place - 1]):
        return True
    if rest.startswith("'s") and (len(rest) == 2 or not rest[2].isalnum()):
        return text[place - 1].isalpha()  # the owner: "the dog's tail" contains "dog"
    return rest[0] in _JOINTS and not _between_digits(text, place)


def _between_digits(text: str, place: int) -> bool:
    near = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    return len(near) == 2 and near.isdigit()


def _is_alone(character: str) -> bool:
    """Whether a character is a word of its own, as in scripts that write no spaces."""
    return any(first <= character <= last for first, last in _UNSPACED)


def _unquoted(folded: str) -> str:
    """A folded text without the quotes or brackets around the whole of it."""
    bare = folded.rstrip(_STOPS)
    pairs = ('""', "''", "()", "[]", "{}", "\u00ab\u00bb", "\u300c\u300d")
    while len(bare) > 2 and bare[0] + bare[-1] in pairs:
        bare = bare[1:-1].strip().rstrip(_STOPS)
    return bare


def _written_out(character: str) -> str:
    """A character whose compatibility form would change a value, in plain characters."""
    if character.isascii():
        return character
    decomposition = unicodedata.decomposition(character)
    plain = unicodedata.normalize("NFKC", character)
    if decomposition.startswith("<super>") and plain[:1] in "0123456789+-\u2212":
        return f"^{plain}"
    if decomposition.startswith("<sub>") and plain[:1] in "0123456789":
        return f"_{plain}"
    if decomposition.startswith("<fraction>"):
        return f" {plain}"
    return character
