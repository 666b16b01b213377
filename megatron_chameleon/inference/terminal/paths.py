"""Find the image files in a line that somebody typed, or dragged into the terminal.

Terminals write the path of a dragged file in their own ways: as it is, with backslashes before
spaces, between quotation marks, or as a file: URL.
"""

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from megatron_chameleon.data.documents.media import IMAGE_SUFFIXES

_WORD = re.compile(r"""'([^']+)'|"([^"]+)"|((?:\\.|[^\s\\'"])+)""")
_ENDS = ".,;:!?)"
"""Punctuation that may follow a path in a sentence."""


def split_images(line: str) -> list[str | Path]:
    """The texts and image files of a line, in order.

    A word counts as an image if it has an image's suffix and names a file that exists. The space
    between a text and an image is left out.
    """
    parts: list[str | Path] = []
    begin = 0
    for match in _WORD.finditer(line):
        path, end = _image_file(match)
        if path is not None:
            parts += [*_text(line[begin : match.start()]), path]
            begin = end
    return [*parts, *_text(line[begin:])]


def read_paths(words: str) -> Iterator[str]:
    """The paths of a command: one name with spaces if there is such a file, else one a word."""
    whole = words.strip()
    if whole and _exists(Path(whole).expanduser()):
        yield whole
        return
    for match in _WORD.finditer(words):
        yield str(Path(_unquoted(match)).expanduser())


def escaped(path: Path) -> str:
    """A path as one word of a command."""
    return re.sub(r"([\s\\'\"])", r"\\\1", str(path))


def _image_file(match: re.Match[str]) -> tuple[Path | None, int]:
    """The file that a word names, and where its name ends in the line."""
    name, end = _unquoted(match), match.end()
    for _ in range(3):
        if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            path = Path(name).expanduser() if name.startswith("~/") else Path(name)
            if _exists(path):
                return path, end
        if match[3] is None or name[-1:] not in _ENDS:
            break
        name, end = name[:-1], end - 1
    return None, end


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _unquoted(match: re.Match[str]) -> str:
    word = match[1] or match[2] or re.sub(r"\\(.)", r"\1", match[3] or "")
    if word.startswith("file://"):
        return urllib.parse.unquote(urllib.parse.urlsplit(word).path)
    return word


def _text(text: str) -> list[str | Path]:
    return [text.strip()] if text.strip() else []
