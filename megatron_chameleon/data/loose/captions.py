"""Captions from the names of folders and files.

>>> caption_of(PurePath("cats/tabby_01.png"))
'cats, tabby'
>>> caption_of(PurePath("DCIM/IMG_20240102_1534.jpg"))
''
"""

import re
import unicodedata
from pathlib import PurePath

MOST_LETTERS = 300


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLACES = _words_of("""
    images image imgs img pictures picture pics photos photo data dataset datasets files train
    training val valid validation dev test testing raw downloads download dcim camera jpg jpeg png
    all new tmp untitled folder
""")
"""Names of folders that say nothing about a picture."""
_CAMERA = _words_of("""
    img dsc dscn dscf imgp pict pxl mvimg image images photo picture pic pics file frame scan
    screenshot untitled download unnamed whatsapp copy final edited thumb thumbnail crop jpg jpeg
    png webp gif
""")
"""Words of file names that cameras and programs write."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")
_HASH = re.compile(r"(?=.*\d)(?=.*[a-f])[0-9a-f]{6,}", re.IGNORECASE)
_MIXED = re.compile(r"(?=.*\d)(?=.*[a-z])[0-9a-z]{12,}", re.IGNORECASE)


def caption_of(path: PurePath) -> str:
    """The words of the folders and of the file name, without numbers and what programs write.

    Args:
        path: Of the picture, from the folder on that the user named.

    Returns:
        Such as "cats, tabby"; empty if the names say nothing.
    """
    folders = [_words(part, _PLACES) for part in path.parts[:-1] if part not in ("/", ".", "..")]
    parts = [*folders, _words(path.stem, _CAMERA)]
    distinct = dict.fromkeys(" ".join(words) for words in parts if words)
    return ", ".join(distinct)[:MOST_LETTERS]


def _words(name: str, empty: frozenset[str]) -> list[str]:
    if name.lower() in empty:
        return []
    found = _WORD.findall(unicodedata.normalize("NFC", name))
    kept = " ".join(word for word in found if not _says_nothing(word, empty))
    words = _HUMP.sub(" ", kept).split()
    return words if any(len(word) > 1 or ord(word) > 127 for word in words) else []


def _says_nothing(word: str, empty: frozenset[str]) -> bool:
    plain = word.rstrip("0123456789").lower()
    return not plain or plain in empty or bool(_HASH.fullmatch(word) or _MIXED.fullmatch(word))
