"""Documents: text and images in reading order, the input of everything.

A document is one line of JSON in one of three forms, told apart by its key; ``id`` and ``source``
are optional, further keys are ignored:

    {"content": [{"type": "text", "text": "..."}, {"type": "image", "image": "PATH or data: URI"}]}
    {"text": "..."}
    {"messages": [{"role": "user", "content": "... or parts as above"}]}

A line that breaks the schema is an error that names file and line: it is a fault of the whole file.
An image that is missing, empty or corrupt is a fault of one document: it shows when
``ImagePart.open`` is called. ``readers.py`` has the files that documents come from.
"""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from megatron_chameleon.errors import DataError

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


class ImageError(DataError):
    """An unusable image; ``reason`` is "missing image", "empty image" or "corrupt image"."""

    def __init__(self, where: str, what: str, remedy: str, reason: str = "corrupt image") -> None:
        super().__init__(where, what, remedy)
        self.reason = reason


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: str | bytes
    """Path of the file, or its bytes; a data: URI that cannot be decoded stays as it is, for
    ``open`` to refuse."""

    def open(self) -> Image.Image:
        """Read and decode the whole image.

        Raises:
            ImageError: When there is no such file, or it is empty or corrupt.
        """
        data, where = self._read()
        if not data:
            raise ImageError(where, "the image has 0 bytes", "Replace or remove it", "empty image")
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            return image
        except Exception as error:  # a broken file makes Pillow's decoders raise anything
            # Pillow's own message for this one holds an address, different in each run
            unknown = isinstance(error, UnidentifiedImageError)
            cause = "unknown format" if unknown else one_line(error)
            what = f"the image of {len(data)} bytes cannot be decoded ({cause})"
            raise ImageError(where, what, "Replace or remove it") from error

    def _read(self) -> tuple[bytes, str]:
        if isinstance(self.image, bytes):
            return self.image, "embedded image"
        if self.image.startswith("data:"):
            what = "the base64 text of a data: URI cannot be decoded"
            raise ImageError(f"{self.image[:40]}...", what, "Write it as data:image/png;base64,...")
        try:
            return Path(self.image).read_bytes(), self.image
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
            remedy = "Give the path relative to the file of documents"
            raise ImageError(self.image, "no such image file", remedy, "missing image") from error
        except OSError as error:  # a disk that fails would otherwise drop document after document
            raise DataError(
                self.image, f"cannot read the image ({error.strerror})", "Check the file system"
            ) from error


@dataclass(frozen=True)
class Document:
    id: str
    source: str
    content: tuple[TextPart | ImagePart, ...]
    where: str
    """File and line (or key, or row) that it was read from."""
    roles: tuple[str, ...] | None = None
    """The speaker of each part, for chat; None for other documents."""


def parse_line(line: bytes, path: Path, number: int) -> Document:
    """Turn one line of JSON into a document.

    Args:
        line: UTF-8 text of one JSON object.
        path: The file, for relative image paths and errors.
        number: Its line, from 1.

    Raises:
        DataError: When it is no JSON object, or breaks the schema.
    """
    where = f"{path}:{number}"
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            where, f"not a line of JSON ({one_line(error)})", "Mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            where, f"a {type(record).__name__}, not an object", "Write one JSON object a line"
        )
    found = [key for key in ("content", "text", "messages") if key in record]
    if len(found) != 1:
        what = f"{' and '.join(found) or 'none'} of the keys content, text and messages"
        what += f" (it has {', '.join(record) or 'no key'})"
        raise DataError(where, what, "Write exactly one of the three")
    identity = record_name(record, "id", f"{path.name}:{number}", where)
    source = record_name(record, "source", path.name.split(".")[0], where)
    roles: tuple[str, ...] | None = None
    if found == ["messages"]:
        content, roles = _parse_messages(record["messages"], path.parent, where)
    else:
        value = record[found[0]]
        if found == ["text"] and not isinstance(value, str):
            raise DataError(
                where, f"text is a {type(value).__name__}, not a string", "Write it as a string"
            )
        content = _parse_content(value, path.parent, where)
    return Document(identity, source, content, where, roles)


def record_name(record: dict[str, Any], key: str, default: str, where: str) -> str:
    """The id or source of a record, as a string; ``default`` where it has none."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str | int):
        raise DataError(
            where,
            f"{key} is a {type(value).__name__}, not a string",
            "Write it as a string, or leave it out",
        )
    return str(value)


def _parse_messages(
    value: Any, folder: Path, where: str
) -> tuple[tuple[TextPart | ImagePart, ...], tuple[str, ...]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            "messages is no list with at least one message",
            "Write a list of role and content",
        )
    parts: list[TextPart | ImagePart] = []
    roles: list[str] = []
    for position, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            what = f"messages[{position}] is no object with a role and content"
            raise DataError(where, what, 'Write {"role": "user", "content": ...}')
        content = _parse_content(message["content"], folder, where)
        parts.extend(content)
        roles.extend([message["role"]] * len(content))
    return tuple(parts), tuple(roles)


def _parse_content(value: Any, folder: Path, where: str) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(value, str):
        return (TextPart(value),)
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            "content is no list with at least one part",
            "Write a list of text and image parts",
        )
    return tuple(
        _parse_part(part, f"content[{position}]", folder, where)
        for position, part in enumerate(value)
    )


def _parse_part(part: Any, name: str, folder: Path, where: str) -> TextPart | ImagePart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image"):
        what = (
            f"{name} has the type {kind!r}"
            if kind is not None
            else f"{name} is no object with a type"
        )
        raise DataError(
            where, what, 'Write {"type": "text", "text": ...} or {"type": "image", "image": ...}'
        )
    value = part.get(kind)
    if not isinstance(value, str):
        remedy = f'Write {{"type": "{kind}", "{kind}": "..."}}'
        raise DataError(where, f"{name} has no string under the key {kind!r}", remedy)
    return TextPart(value) if kind == "text" else image_part(value, folder, where)


def image_part(value: str | bytes, folder: Path, where: str) -> ImagePart:
    """An image from a path, a data: URI or bytes.

    Args:
        value: A path is relative to ``folder``.
        folder: Where the file of documents lies.
        where: File and line, for errors.

    Raises:
        DataError: When it is a link.
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
    return ImagePart(value if value.startswith("data:") else str(folder / value))


def one_line(error: BaseException) -> str:
    """The message of an exception, fit for one line of ours."""
    return " ".join(str(error).split()) or type(error).__name__
