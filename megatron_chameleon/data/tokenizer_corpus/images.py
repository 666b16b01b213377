"""Images to train an image tokenizer on: files, whole folders, and those of documents.

A document may have ``"weight": 2``: its images are then drawn twice as often. The paper does this
with images that show faces (section 2.1).
"""

import glob
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.records import Origin, document_of
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.inputs.files import find_inputs, has_documents
from megatron_chameleon.data.inputs.form_keys import WEIGHT_KEY
from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments, kept_documents
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import writing
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.wording import counted


@dataclass(frozen=True)
class ImageEntry:
    """One image to train on, not yet opened."""

    part: "ImagePart | StoredImage"
    where: str
    """What errors name: the file, or the document."""
    weight: float = 1.0
    """How often it is drawn relative to the others."""

    def open(self) -> Image.Image:
        """Read and decode the image.

        Raises:
            ImageError: It cannot be read or decoded.
            DataError: A disk or network fails.
        """
        return self.part.open()


class ImageStore:
    """The bytes of images that documents hold themselves, in an unnamed temporary file.

    Corpora of tars and parquet files are larger than the memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as this
        self._size = 0

    def add(self, data: bytes, options: ImageOptions) -> "StoredImage":
        """Keep the bytes of an image.

        Raises:
            DataError: The disk of the temporary folder is full.
        """
        with writing(f"{tempfile.gettempdir()} (the folder of TMPDIR)"):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._size += len(data)
        return StoredImage(self, self._size - len(data), len(data), options)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


@dataclass(frozen=True)
class StoredImage:
    """An image in an ``ImageStore``."""

    store: ImageStore = field(repr=False)
    offset: int
    size: int
    options: ImageOptions

    def open(self) -> Image.Image:
        """Decode the image; raises as ``ImagePart.open``."""
        return ImagePart(self.store.read(self.offset, self.size), self.options).open()


@dataclass(slots=True)
class _WeightedDocument(Document):
    weight: float = 1.0


def find_images(
    words: Sequence[str | Path],
    images: ImageOptions | None = None,
    dropped: DroppedDocuments | None = None,
) -> list[ImageEntry]:
    """Find the images of a corpus, in order.

    Args:
        words: Image files, folders (all images in them, by name), globs of image files, and
            documents: paths, globs or URLs, as ``preprocess`` takes them.
        images: Where images of documents may lie, and how all are read.
        dropped: Gets the documents that are left out.

    Raises:
        DataError: If a file is missing, a disk or network fails, or there is no image at all.
    """
    options = images or ImageOptions()
    dropped = DroppedDocuments() if dropped is None else dropped
    store = ImageStore()
    entries = [
        entry for word in map(str, words) for entry in _images_of(word, options, dropped, store)
    ]
    if not entries:
        what = "no image found"
        if dropped.reasons:
            what += f", {dropped.summary()}"
        names = ", ".join(map(str, words))
        raise DataError(names[:500], what, "Pass image files, folders or documents with images")
    if sum(entry.weight for entry in entries) <= 0:
        what = f"the weights of all {counted(len(entries), 'image')} are 0"
        raise DataError(entries[0].where, what, "Set one above 0")
    return entries


def _images_of(
    word: str, options: ImageOptions, dropped: DroppedDocuments, store: ImageStore
) -> Iterator[ImageEntry]:
    if "://" in word or has_documents(word):
        inputs = find_inputs([word])
        for document in kept_documents(inputs, dropped, options, _weighted_document_of):
            yield from _images_in(document, store)
        return
    paths = [Path(word)]
    if glob.has_magic(word) and not paths[0].exists():
        paths = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        if not paths:
            raise DataError(word, "matches no file", "Check the pattern")
    for path in paths:
        if not path.exists():
            raise DataError(str(path), "no such file", "Pass an existing file")
        files = _in_folder(path) if path.is_dir() else [path]
        yield from (ImageEntry(ImagePart(str(file), options), str(file)) for file in files)


def _in_folder(folder: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)


def _images_in(document: Document, store: ImageStore) -> Iterator[ImageEntry]:
    weight = document.weight if isinstance(document, _WeightedDocument) else 1.0
    parts = (part for part in document.content if isinstance(part, ImagePart))
    for number, part in enumerate(parts, start=1):
        if isinstance(part.image, bytes):
            where = f"{document.where}: image {number}"
            yield ImageEntry(store.add(part.image, part.options), where, weight)
        else:
            yield ImageEntry(part, f"{document.where}: {part.reference or part.name}", weight)


def _weighted_document_of(
    record: Mapping[str, Any], origin: Origin, own: Mapping[str, bytes] | None = None
) -> Document:
    """``document_of`` with the key ``weight``."""
    weight = record.get(WEIGHT_KEY, 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < float("inf"):
        what = f"`{WEIGHT_KEY}` is {weight!r:.99}"
        raise DataError(origin.where, what, "Use a number of 0 or more")
    rest = {key: value for key, value in record.items() if key != WEIGHT_KEY}
    document = document_of(rest, origin, own)
    values = {entry.name: getattr(document, entry.name) for entry in fields(Document)}
    return _WeightedDocument(**values, weight=float(weight))
