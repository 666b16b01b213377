"""Documents: text and images in reading order, the input of everything.

A document is one line of JSON in one of four forms, told apart by its key; ``id`` and ``source``
are optional, further keys are ignored:

    {"content": [{"type": "text", "text": "..."}, {"type": "image", "image": "PATH or data: URI"}]}
    {"text": "..."}
    {"messages": [{"role": "user", "content": "... or parts as above"}, {"role": "assistant", ...}]}
    {"prompt": "... or parts as above", "answer": "... or parts as above"}

The last two are conversations, see ``conversations.py``. A line that breaks the schema is an error
that names file and line. An image that is missing, empty,
too large or corrupt shows when ``ImagePart.open`` is called. ``readers.py`` has the files that
documents come from.
"""

import base64
import errno
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import orjson
from PIL import Image, UnidentifiedImageError

from megatron_chameleon.errors import DataError

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
"""Who speaks in a conversation."""
BEHIND_SYSTEM = "\n\n"
"""Text between a system message and the prompt that it belongs to."""

LARGEST_IMAGE_PIXELS = 1 << 26
"""67 million, above any camera of the web's pictures; Pillow's own limit would take gigabytes."""
LARGEST_IMAGE_BYTES = 128 << 20


class ImageError(DataError):
    """An unusable image; ``reason`` says how: missing, empty, too large, corrupt."""

    def __init__(self, where: str, what: str, remedy: str, reason: str = "corrupt image") -> None:
        super().__init__(where, what, remedy)
        self.reason = reason


@dataclass(slots=True)
class TextPart:
    text: str


@dataclass(slots=True)
class ImagePart:
    image: str | bytes
    """Path or URL of the file, or its bytes; a data: URI that cannot be decoded stays as it is, for
    ``open`` to refuse."""

    def open(self) -> Image.Image:
        """Read and decode the whole image.

        Raises:
            ImageError: When there is no such file, or it is empty, too large or corrupt.
        """
        return self.decode(self.read())

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: When there is no such file, or it is empty or too large.
            DataError: When a disk or network fails.
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
        """The image of its bytes.

        Raises:
            ImageError: When it is too large or corrupt.
        """
        try:
            image = Image.open(io.BytesIO(data))
            pixels = image.width * image.height
            if pixels <= LARGEST_IMAGE_PIXELS:
                image.load()
                return image
        except Exception as error:  # a broken file makes Pillow's decoders raise anything
            if isinstance(error, Image.DecompressionBombError):
                raise self._too_large(one_line(error)) from error
            # Pillow's own message for this one holds an address, different in each run
            unknown = isinstance(error, UnidentifiedImageError)
            cause = "unknown format" if unknown else one_line(error)
            what = f"the image of {len(data)} bytes cannot be decoded ({cause})"
            raise ImageError(self.name, what, "Replace or remove it") from error
        raise self._too_large(f"{pixels} pixels, {LARGEST_IMAGE_PIXELS} are the most")

    @property
    def name(self) -> str:
        """What errors call it."""
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
        except OSError as error:  # a disk that fails would otherwise drop document after document
            if error.errno == errno.ENAMETOOLONG:
                what, remedy = "no such image file", "Write paths or data: URIs"
                raise ImageError(self.name[:99], what, remedy, "missing image") from error
            what = f"cannot read the image ({error.strerror or one_line(error)})"
            raise DataError(self.name, what, "Check the file system") from error


@dataclass(slots=True)
class Document:
    id: str
    source: str
    content: tuple[TextPart | ImagePart, ...]
    where: str
    """File and line (or key, or row) that it was read from."""
    roles: tuple[str, ...] | None = None
    """The speaker of each part of a conversation; None for other documents."""
    record: int = 0
    """Line, sample or row of its file, from 1."""


def parse_line(line: bytes, path: str | Path, number: int) -> Document:
    """Turn one line of JSON into a document.

    Args:
        line: UTF-8 text of one JSON object.
        path: The file or URL, for relative image paths and errors.
        number: Its line, from 1.

    Raises:
        DataError: When it is no JSON object, or breaks the schema.
    """
    where = f"{path}:{number}"
    record = _parse_json(line, where, number)
    kinds: tuple[str, ...] = ("content", "text", "messages")
    found = [key for key in kinds if key in record]
    if not found and "prompt" in record:
        found = ["prompt"]
    if len(found) != 1:
        what = f"{' and '.join(found) or 'none'} of the keys content, text and messages"
        what += f" (it has {', '.join(record)[:200] or 'no key'})"
        raise DataError(where, what, "Write exactly one of the three, or prompt and answer")
    name = str(path).rsplit("/", 1)[-1]
    identity = record_name(record, "id", f"{name}:{number}", where)
    source = record_name(record, "source", name.split(".")[0], where)
    roles: tuple[str, ...] | None = None
    value = record[found[0]]
    content: tuple[TextPart | ImagePart, ...]
    if found == ["text"]:
        if not isinstance(value, str):
            what = f"text is a {type(value).__name__}, not a string"
            raise DataError(where, what, "Write it as a string")
        content = (TextPart(value),)
    elif found == ["messages"]:
        content, roles = parse_messages(value, folder_of(path), where)
    elif found == ["prompt"]:
        messages = [{"role": USER, "content": value}]
        if "answer" in record:
            messages.append({"role": ASSISTANT, "content": record["answer"]})
        content, roles = parse_messages(messages, folder_of(path), where, ("prompt", "answer"))
    else:
        content = _parse_content(value, folder_of(path), where)
    return Document(identity, source, content, where, roles, number)


def _parse_json(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # stricter: no lone surrogates, no NaN, no byte order mark
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            what = f"not a line of JSON ({one_line(error)})"
            raise DataError(where, what, "Mend or remove the line") from error
    if not isinstance(record, dict):
        what = f"a {type(record).__name__}, not an object"
        raise DataError(where, what, "Write one JSON object a line")
    return record


def folder_of(path: str | Path) -> str:
    """The folder or URL that relative paths of images in a file belong to."""
    if "://" in str(path):
        return str(path).rsplit("/", 1)[0]
    return str(Path(path).parent)


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


def parse_messages(
    value: Any, folder: str, where: str, names: tuple[str, ...] = ()
) -> tuple[tuple[TextPart | ImagePart, ...], tuple[str, ...]]:
    """The parts of all messages, and who speaks in each.

    Args:
        value: Of the key ``messages``.
        folder: Where the file of documents lies.
        where: File and line, for errors.
        names: What errors call each message; empty for their places in the list.

    Raises:
        DataError: They are no messages, or not in order.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            "messages is no list with at least one message",
            "Write a list of role and content",
        )
    parts: list[TextPart | ImagePart] = []
    roles: list[str] = []
    for position, message in enumerate(value):
        name = names[position] if names else f"messages[{position}]"
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            what = f"{name} is no object with a role and content"
            raise DataError(where, what, 'Write {"role": "user", "content": ...}')
        role = message["role"]
        _check_order(role, roles[-1] if roles else None, name, where)
        content = _parse_content(message["content"], folder, where, name if names else "content")
        if not any(isinstance(part, ImagePart) or part.text.strip() for part in content):
            remedy = "Write text or an image, or leave the document out"
            raise DataError(where, f"{name} ({role}) is empty", remedy)
        if role == SYSTEM:
            content = (*content, TextPart(BEHIND_SYSTEM))
        parts.extend(content)
        roles.extend([role] * len(content))
    return tuple(parts), tuple(roles)


def _check_order(role: str, before: str | None, name: str, where: str) -> None:
    """Refuse a message of an unknown role, or one that cannot follow the one before it."""
    if role not in (SYSTEM, USER, ASSISTANT):
        what = f"{name} has the role {role[:40]!r}"
        raise DataError(where, what, "Write user, assistant or system")
    if role == SYSTEM and before is not None:
        what = f"{name} is of the system, behind other messages"
        raise DataError(where, what, "Put the one system message first")
    if role == before:
        what = f"{name} is of the {role}, as the one before it"
        raise DataError(where, what, "Join the two: user and assistant take turns")
    if role == ASSISTANT and before != USER:
        what = f"{name} is of the assistant, and no user has asked"
        raise DataError(where, what, "Put the user's message before it")


def _parse_content(
    value: Any, folder: str, where: str, name: str = "content"
) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(value, str):
        return (TextPart(value),)
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            f"{name} is no list with at least one part",
            "Write a list of text and image parts",
        )
    return tuple(
        _parse_part(part, f"{name}[{position}]", folder, where)
        for position, part in enumerate(value)
    )


def _parse_part(part: Any, name: str, folder: str, where: str) -> TextPart | ImagePart:
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


def image_part(value: str | bytes, folder: str, where: str) -> ImagePart:
    """An image from a path, a data: URI or bytes.

    Args:
        value: A path is relative to ``folder``.
        folder: Where the file of documents lies, a path or URL.
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
    if value.startswith("data:") or "://" in value:
        return ImagePart(value)
    return ImagePart(f"{folder}/{value}" if "://" in folder else str(Path(folder) / value))


def one_line(error: BaseException) -> str:
    """The message of an exception, fit for one line of ours."""
    return " ".join(str(error).split()) or type(error).__name__
