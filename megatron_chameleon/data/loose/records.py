"""Turns loose pictures and texts into records, and writes them as files of documents.

    chameleon data collect photos/ notes/ --output documents

A picture has the text beside it as its caption, or the words of its name (``captions.py``). A long
text becomes several documents, cut at empty lines, so that some can be held out.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.data.loose.captions import caption_of
from megatron_chameleon.data.loose.walk import TEXT_SUFFIXES, Found, LooseFile
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import cannot_read, open_to_read, replace_file

NAMES, NONE = "names", "none"
CAPTIONS = (NAMES, NONE)
PICTURES, TEXTS = "pictures", "texts"
"""The sources, and the names of their files."""
DOCUMENT_CHARACTERS = 8_000
"""A longer text is cut into several documents."""
_LONGEST_CAPTION = 1 << 16
_READ_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Collected:
    """What ``collect`` wrote."""

    path: Path
    documents: int
    files: int
    broken: list[str]
    """Where and why, for each file that was left out."""


def collect(found: Found, output: Path, captions: str = NAMES) -> list[Collected]:
    """Write OUTPUT/pictures.jsonl and OUTPUT/texts.jsonl, each if there is something to write.

    Args:
        found: From ``walk.find_loose``.
        output: A folder that exists.
        captions: What a picture without a text beside it gets: the words of its ``names``, or
            ``none``.

    Raises:
        DataError: A file cannot be written.
    """
    written = []
    for name, files in ((PICTURES, found.pictures), (TEXTS, found.texts)):
        if files:
            path = output / f"{name}.jsonl"
            written.append(_write(path, files, lambda file: records_of(file, captions)))
    return written


def _write(
    path: Path, files: Sequence[LooseFile], records: Callable[[LooseFile], Iterator[dict[str, Any]]]
) -> Collected:
    documents, broken = 0, []
    with replace_file(path) as output:
        for file in files:
            try:
                for record in records(file):
                    output.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    documents += 1
            except DataError as error:
                broken.append(f"{error.where}: {error.what}")
    return Collected(path, documents, len(files), broken)


def records_of(file: LooseFile, captions: str = NAMES) -> Iterator[dict[str, Any]]:
    """The records of a loose file: one of a picture, one or more of a text.

    Raises:
        DataError: A text, or the text beside a picture, is not UTF-8.
    """
    if is_text(file):
        pieces = enumerate(_pieces(file.path), start=1)
        for number, text in pieces:
            name = f"{file.name}#{number}" if number > 1 else str(file.name)
            yield {"id": name, "source": TEXTS, "text": text}
        return
    caption = caption_of(file.name) if captions == NAMES else ""
    if file.caption is not None:
        caption = next(_pieces(file.caption, _LONGEST_CAPTION), "").strip() or caption
    content = [{"type": "image", "image": str(file.path)}]
    if caption:
        content.append({"type": "text", "text": caption})
    yield {"id": str(file.name), "source": PICTURES, "content": content}


def is_text(file: LooseFile) -> bool:
    """Whether a loose file is a text."""
    return file.path.suffix.lower() in TEXT_SUFFIXES


def _pieces(path: Path, most: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """The text of a file in pieces of at most ``most`` characters, cut at empty lines, then at line
    ends, then at spaces."""
    rest = ""
    for chunk in _text_of(path):
        rest += chunk
        while len(rest) > most:
            end = _cut(rest, most)
            if rest[:end].strip():
                yield rest[:end].strip("\n")
            rest = rest[end:]
    if rest.strip():
        yield rest.strip("\n")


def _cut(text: str, most: int) -> int:
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, most // 2, most)
        if place >= 0:
            return place + len(mark)
    return most


def _text_of(path: Path) -> Iterator[str]:
    with open_to_read(path) as file:
        head = file.read(2)
        file.seek(0)
        name = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        try:
            lines = io.TextIOWrapper(file, encoding=name)
            while text := lines.read(_READ_CHARACTERS):
                if "\0" in text:
                    raise DataError(str(path), "holds zero bytes: no text", "Leave it out")
                yield text
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 ({error.reason})"
            raise DataError(str(path), what, "Convert it to UTF-8") from error
        except OSError as error:
            raise cannot_read(path, error) from error
