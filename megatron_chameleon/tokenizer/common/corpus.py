"""Training data of the tokenizers: texts and images from files, folders and documents.

Only the text parts or the images of a document are read here, because training the tokenizers needs
nothing else. A document may have ``"weight": 2``: its images are then drawn twice as often. The
paper does this with images that show faces (section 2.1).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.images.decoding import decode_image
from megatron_chameleon.images.local_files import read_named
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import ImageFolder, decode_data_uri


@dataclass(frozen=True)
class ImageEntry:
    """One image to train on, not yet opened."""

    image: Path | bytes | str
    """The path of an image file that the user named, the bytes of one, or a document's reference
    to one in ``folder``."""
    where: str
    """What errors name: the file, or the line of the document."""
    weight: float = 1.0
    """How often it is drawn relative to the others."""
    folder: ImageFolder = field(default_factory=ImageFolder)
    """Where a reference may lead, and how images are read."""

    def open(self) -> Image.Image:
        """Read and decode the image.

        Raises:
            ImageError: It cannot be read or decoded.
            DataError: A disk fails.
        """
        options = self.folder.options
        if isinstance(self.image, bytes):
            data = self.image
        elif isinstance(self.image, Path):
            data = read_named(str(self.image), options)
        else:
            data = self.folder.read(self.image)
        return decode_image(data, self.where, options)


def read_texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """Read the texts of .txt files (line by line) and of .jsonl documents (each text part).

    Raises:
        DataError: If a file is missing, of another kind, not UTF-8 or not JSON Lines.
    """
    for path in map(Path, paths):
        _check_file(path)
        if path.suffix == ".jsonl":
            for where, document in _documents(path):
                yield from _texts_of(document, where)
        elif path.suffix == ".txt":
            for _, line in _lines(path):
                yield line
        else:
            what = f"unknown kind of text file ({path.suffix or 'no suffix'})"
            raise DataError(str(path), what, "Pass a .txt or .jsonl file")


def find_images(
    paths: Sequence[str | Path], images: ImageOptions | None = None
) -> list[ImageEntry]:
    """Find images: image files, all images in folders (by name), and those of .jsonl documents.

    Args:
        paths: Files and folders.
        images: Where images of documents may lie, and how all are read.

    Raises:
        DataError: If a path is missing, a document is broken, or there is no image at all.
    """
    entries: list[ImageEntry] = []
    for path in map(Path, paths):
        folder = ImageFolder.of(path, images)
        if path.is_dir():
            suffixes = Image.registered_extensions()
            files = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            entries += [ImageEntry(file, str(file), folder=folder) for file in sorted(files)]
            continue
        _check_file(path)
        if path.suffix == ".jsonl":
            for where, document in _documents(path):
                entries += _images_of(document, where, folder)
        else:
            entries.append(ImageEntry(path, str(path), folder=folder))
    if not entries:
        names = ", ".join(map(str, paths))
        raise DataError(names, "no image found", "Pass image files, folders or .jsonl documents")
    if sum(entry.weight for entry in entries) <= 0:
        raise DataError(
            entries[0].where, f"the weights of all {len(entries)} images are 0", "Set one above 0"
        )
    return entries


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(str(path), what, "Pass an existing file")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number + 1}", f"not valid UTF-8 ({error.reason})", "Convert the file to UTF-8"
        ) from error


def _documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            document = json.loads(line)
        except ValueError as error:
            what = f"the line is not valid JSON ({error})"
            raise DataError(where, what, "Write one document per line") from error
        if not isinstance(document, dict):
            raise _bad_document(where, "the line must be a JSON object")
        yield where, document


def _parts(document: dict[str, Any], where: str, kind: str) -> list[dict[str, Any]]:
    content = document.get("content", [])
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise _bad_document(where, "`content` must be a list of parts")
    parts = [part for part in content if part.get("type") == kind]
    if not all(isinstance(part.get(kind), str) for part in parts):
        raise _bad_document(where, f"a part of type {kind!r} has no string under `{kind}`")
    return parts


def _texts_of(document: dict[str, Any], where: str) -> list[str]:
    if "content" in document:
        return [part["text"] for part in _parts(document, where, "text")]
    if isinstance(document.get("text"), str):
        return [document["text"]]
    raise _bad_document(where, "has neither `content` nor a string `text`")


def _images_of(document: dict[str, Any], where: str, folder: ImageFolder) -> list[ImageEntry]:
    weight = document.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < float("inf"):
        raise DataError(where, f"`weight` is {weight!r}", "Use a number of 0 or more")
    entries = []
    for number, part in enumerate(_parts(document, where, "image"), start=1):
        name = part["image"]
        if name.startswith("data:"):
            # one that cannot be decoded is dropped like any other unreadable image
            image, shown = decode_data_uri(name) or b"", f"image {number}"
            entries.append(ImageEntry(image, f"{where}: {shown}", weight, folder))
        else:
            entries.append(ImageEntry(name, f"{where}: {name}", weight, folder))
    return entries


def _bad_document(where: str, what: str) -> DataError:
    form = '{"content": [{"type": "text", "text": "..."}, {"type": "image", "image": "PATH"}]}'
    return DataError(where, what, f"Write documents as {form}")
