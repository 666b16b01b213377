"""Images of documents: a path, a URL or bytes, opened when they are needed.

An image that is missing, empty, too large or corrupt is noticed when ``ImagePart.open`` is called.
"""

import base64
import errno
import io
import re
from dataclasses import dataclass
from pathlib import Path

import fsspec
from PIL import Image, UnidentifiedImageError

from megatron_chameleon.errors import DataError

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)

LARGEST_IMAGE_PIXELS = 1 << 26
"""67 million, more than the pictures of any camera have; images at Pillow's own limit would take
gigabytes."""
LARGEST_IMAGE_BYTES = 128 << 20


class ImageError(DataError):
    """An unusable image; ``reason`` says why: missing, empty, too large or corrupt image."""

    def __init__(self, where: str, what: str, remedy: str, reason: str = "corrupt image") -> None:
        super().__init__(where, what, remedy)
        self.reason = reason


@dataclass(slots=True)
class ImagePart:
    image: str | bytes
    """Path or URL of the file, or its bytes. A data: URI that cannot be decoded is kept as it is;
    ``open`` refuses it."""

    def open(self) -> Image.Image:
        """Read and decode the whole image.

        Raises:
            ImageError: If there is no such file, or it is empty, too large or corrupt.
        """
        return self.decode(self.read())

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: If there is no such file, or it is empty or too large.
            DataError: If a disk or network fails.
        """
        data = self.image if isinstance(self.image, bytes) else self._read_file(self.image)
        if not data:
            what, remedy = "the image has 0 bytes", "Replace or remove it"
            raise ImageError(self.name, what, remedy, "empty image")
        if len(data) > LARGEST_IMAGE_BYTES:
            what = f"the image has more than {LARGEST_IMAGE_BYTES >> 20} MiB"
            raise ImageError(self.name, what, "Replace or remove it", "too large image")
        return data

    def decode(self, data: bytes) -> Image.Image:
        """Decode the bytes of an image file.

        Raises:
            ImageError: If the image is too large or corrupt.
        """
        try:
            image = Image.open(io.BytesIO(data))
            pixels = image.width * image.height
            if pixels <= LARGEST_IMAGE_PIXELS:
                image.load()
                return image
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions
            if isinstance(error, Image.DecompressionBombError):
                raise self._too_large(one_line(error)) from error
            # Pillow's own message for this one holds an address, different in each run
            unknown = isinstance(error, UnidentifiedImageError)
            cause = "unknown format" if unknown else one_line(error)
            what = f"the image of {len(data)} bytes cannot be decoded ({cause})"
            raise ImageError(self.name, what, "Replace or remove it") from error
        raise self._too_large(f"{pixels} pixels, the limit is {LARGEST_IMAGE_PIXELS}")

    @property
    def name(self) -> str:
        """What error messages call it."""
        if isinstance(self.image, bytes):
            return "embedded image"
        return f"{self.image[:40]}..." if self.image.startswith("data:") else self.image

    def _too_large(self, cause: str) -> ImageError:
        what = f"the image is too large ({cause})"
        return ImageError(self.name, what, "Make it smaller or remove it", "too large image")

    def _read_file(self, path: str) -> bytes:
        if path.startswith("data:"):
            what = "the base64 text of a data: URI cannot be decoded"
            raise ImageError(self.name, what, "Write it as data:image/png;base64,...")
        try:
            with fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file:
                data: bytes = file.read(LARGEST_IMAGE_BYTES + 1)
                return data
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
            remedy = "Give the path relative to the file of documents"
            raise ImageError(self.name, "no such image file", remedy, "missing image") from error
        except OSError as error:  # otherwise a failing disk would drop one document after another
            if error.errno == errno.ENAMETOOLONG:
                what, remedy = "no such image file", "Write paths or data: URIs"
                raise ImageError(self.name[:99], what, remedy, "missing image") from error
            what = f"cannot read the image ({error.strerror or one_line(error)})"
            raise DataError(self.name, what, "Check the file system") from error


def folder_of(path: str | Path) -> str:
    """The folder or URL that relative image paths in a file start from."""
    if "://" in str(path):
        return str(path).rsplit("/", 1)[0]
    return str(Path(path).parent)


def image_part(value: str | bytes, folder: str, where: str) -> ImagePart:
    """Make an image part of a path, a data: URI or bytes.

    Args:
        value: A path is relative to ``folder``.
        folder: The folder or URL of the file of documents.
        where: File and line, for errors.

    Raises:
        DataError: If it is a link to the web.
    """
    if isinstance(value, bytes):
        return ImagePart(value)
    uri = _DATA_URI.match(value)
    if uri:
        try:
            return ImagePart(base64.b64decode(value[uri.end() :], validate=True))
        except ValueError:
            return ImagePart(value)
    if value.startswith(("http://", "https://")):
        raise DataError(
            where,
            f"the image is a link ({value[:60]})",
            "Download images first, for example with img2dataset",
        )
    if value.startswith("data:") or "://" in value:
        return ImagePart(value)
    return ImagePart(f"{folder}/{value}" if "://" in folder else str(Path(folder) / value))


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line."""
    return " ".join(str(error).split()) or type(error).__name__
