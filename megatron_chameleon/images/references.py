"""References to images: what a data file names is looked up in one way, by every verb.

A reference is a path relative to the folder of its document's file. What it leads to, after all
links, must lie below that folder or below a root (``--image-root``). A relative path that is not
found in the folder is looked up below the roots, in their order; an absolute path or a ``file://``
URL must lie below one of these places. URLs need ``--image-protocols``, except those below the URL
of the documents or of a root. A document thus chooses neither a host nor a file elsewhere.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from megatron_chameleon.files import cannot_read
from megatron_chameleon.images.image_error import ImageError, missing
from megatron_chameleon.images.local_files import open_checked, read_all
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.remote_files import (
    file_url_path,
    is_url,
    read_below_url,
    read_foreign_url,
    stays_below,
)

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_NAME_LENGTH = 200


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Where the images of a file of documents may lie, and how they are read."""

    path: str = "."
    """The folder or URL that relative references start from."""
    options: ImageOptions = field(default_factory=ImageOptions)
    documents: str = ""
    """The file of documents, which exists as long as the disk or network works; if empty, the
    folder is taken."""

    @classmethod
    def of(cls, documents: str | Path, options: ImageOptions | None = None) -> "ImageFolder":
        """The folder of a file of documents, a path or URL."""
        name = str(documents)
        folder = name.rsplit("/", 1)[0] if is_url(name) else str(Path(name).parent)
        return cls(folder, options or ImageOptions(), name)

    def join(self, value: str) -> str:
        """What a reference is called: its path from here on, or the reference itself."""
        if is_url(value) or value.startswith("/"):
            return value
        return f"{self.path}/{value}" if is_url(self.path) else str(Path(self.path) / value)

    def read(self, value: str) -> bytes:
        """Read the image that a reference names.

        Raises:
            ImageError: It is not there, lies elsewhere, or is too large.
            DataError: A disk or network fails.
        """
        name = shown(self.join(value))
        if is_url(value):
            return self._read_url(value, name)
        if value.startswith("/"):
            return self._read_local([value], name)
        return self._read_relative(value, name)

    def _read_relative(self, value: str, name: str) -> bytes:
        """Look below the folder, then below each root; the last place says what is wrong."""
        places = (self.path, *self.options.roots)
        faults: list[ImageError] = []
        for place in places:
            try:
                if not is_url(place):
                    return self._read_local([f"{place}/{value}"], name)
                if not stays_below(value):
                    raise missing(name, "a path below a URL cannot have `..`, `::` or a null byte")
                url = f"{place}/{value}"
                return read_below_url(url, name, self.documents or self.path, self.options)
            except ImageError as fault:
                if fault.reason not in ("missing image", "refused image"):
                    raise
                faults.append(fault)
        raise next((fault for fault in faults if fault.reason == "refused image"), faults[0])

    def _read_url(self, value: str, name: str) -> bytes:
        path = file_url_path(value)
        if path is not None:
            return self._read_local(list(dict.fromkeys((path, unquote(path)))), name)
        for place in filter(is_url, (self.path, *self.options.roots)):
            relative = value.removeprefix(f"{place.rstrip('/')}/")
            if relative != value and stays_below(relative):
                return read_below_url(value, name, self.documents or self.path, self.options)
        return read_foreign_url(value, self._local_places(), name, self.options)

    def _read_local(self, candidates: Sequence[str], name: str) -> bytes:
        """Read the first of the paths that exists."""
        places = self._local_places()
        for last, candidate in enumerate(candidates, start=1):
            try:
                with open_checked(candidate, places, name) as descriptor:
                    return read_all(descriptor, name, self.options)
            except ImageError as fault:
                if fault.reason == "missing image":
                    self._check_disk()
                if last == len(candidates):
                    raise
        raise AssertionError

    def _local_places(self) -> list[str]:
        return [place for place in (self.path, *self.options.roots) if not is_url(place)]

    def _check_disk(self) -> None:
        """A disk that went away would otherwise drop one document after another.

        Raises:
            DataError: The documents' own file cannot be found any more either.
        """
        where = self.documents or self.path
        if is_url(where):
            return
        try:
            Path(where).stat()
        except OSError as error:
            raise cannot_read(where, error) from error


def decode_data_uri(value: str) -> bytes | None:
    """The bytes of a base64 ``data:`` URI; None if the value is none, or is broken."""
    uri = _DATA_URI.match(value)
    if not uri:
        return None
    try:
        return base64.b64decode(value[uri.end() :], validate=True)
    except ValueError:
        return None


def is_data_uri(value: str) -> bool:
    """Whether a value is a ``data:`` URI, valid or broken."""
    return value[:5].lower() == "data:"


def shown(name: str) -> str:
    """A name as errors show it: on one line of bounded length."""
    if is_data_uri(name):
        return f"{name[:40]}..."
    short = name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
