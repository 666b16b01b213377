"""Images of documents: a reference or bytes, opened when they are needed.

An image that is missing, refused, empty, too large or corrupt is noticed when ``ImagePart.open`` is
called. ``images/`` says where references may lead and how files are decoded.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from megatron_chameleon.images.decoding import decode_image
from megatron_chameleon.images.image_error import ImageError, missing
from megatron_chameleon.images.local_files import above_limit, read_named
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import (
    ImageFolder,
    decode_data_uri,
    is_data_uri,
    shown,
)
from megatron_chameleon.images.remote_files import is_url, read_below_url

__all__ = ["ImageError", "ImageFolder", "ImagePart", "image_part", "missing_image"]


@dataclass(slots=True)
class ImagePart:
    """An image of a document, or one that the user named.

    Without a folder it is the user's: its path or URL is opened wherever it leads.
    """

    image: str | bytes
    """Path or URL of the file, or its bytes. A data: URI that cannot be decoded is kept as it is;
    ``open`` refuses it."""
    options: ImageOptions = field(default_factory=ImageOptions, compare=False, repr=False)
    folder: ImageFolder | None = field(default=None, compare=False, repr=False)
    """Where the reference of a data file may lead."""
    reference: str = field(default="", compare=False, repr=False)
    """The image as the data file names it."""

    def open(self) -> Image.Image:
        """Read and decode the whole image.

        Raises:
            ImageError: If it cannot be read or decoded: the fault of its document.
            DataError: If a disk or network fails.
        """
        return self.decode(self.read())

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: If there is no such file, it lies where no option allows, or it is empty or
                too large.
            DataError: If a disk or network fails.
        """
        data = self.image if isinstance(self.image, bytes) else self._read_file(self.image)
        if not data:
            what, remedy = "the image has 0 bytes", "Replace or remove it"
            raise ImageError(self.name, what, remedy, "empty image")
        if len(data) > self.options.max_bytes:
            raise above_limit(self.name, len(data), self.options)
        return data

    def decode(
        self, data: bytes, before_pixels: Callable[[Image.Image], None] = lambda _: None
    ) -> Image.Image:
        """Decode the bytes of an image file.

        Args:
            data: The bytes.
            before_pixels: Called when the mode and size are known and no pixel is decoded.

        Raises:
            ImageError: If the image is too large or corrupt.
        """
        return decode_image(data, self.name, self.options, before_pixels)

    def size_on_disk(self) -> int:
        """Bytes of a local file; 0 if they are in memory already, or not known."""
        try:
            return 0 if isinstance(self.image, bytes) else os.stat(self.image).st_size  # noqa: PTH116
        except (OSError, ValueError):
            return 0

    @property
    def name(self) -> str:
        """What error messages call it."""
        return "embedded image" if isinstance(self.image, bytes) else shown(self.image)

    def _read_file(self, path: str) -> bytes:
        if is_data_uri(path):
            what = "the base64 text of a data: URI cannot be decoded"
            raise ImageError(self.name, what, "Write it as data:image/png;base64,...")
        if self.folder is not None:
            if not self.reference:
                raise missing(self.name)
            return self.folder.read(self.reference)
        if is_url(path):
            return read_below_url(path, self.name, path, self.options)
        return read_named(path, self.options)


def image_part(value: str | bytes, folder: ImageFolder) -> ImagePart:
    """Make an image part of what a data file says: a reference, a data: URI or bytes."""
    if isinstance(value, bytes):
        return ImagePart(value, folder.options)
    content = decode_data_uri(value)
    if content is not None:
        return ImagePart(content, folder.options)
    if is_data_uri(value):  # a broken one, which is not the name of a file
        return ImagePart(value, folder.options)
    return ImagePart(folder.join(value), folder.options, folder, value)


def missing_image(name: str, folder: ImageFolder) -> ImagePart:
    """A part for an image that a record lacks, so that its document is dropped for that reason."""
    return ImagePart(name, folder.options, folder, "")
