"""Turns documents into lines of our own schema that train as the documents do, byte for byte.

Parts stay apart, because each of them is tokenized by itself. A picture is a reference where it
lies below the folder of the new file, and otherwise a copy in a folder beside that file, under the
SHA-256 of its bytes.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import BEHIND_SYSTEM, SYSTEM, Document, TextPart
from megatron_chameleon.files import write_bytes
from megatron_chameleon.images.references import ImageFolder
from megatron_chameleon.images.remote_files import file_url_path, is_url

AUTO, COPY, EMBED = "auto", "copy", "embed"
IMAGE_MODES = (AUTO, COPY, EMBED)
_SUFFIXES = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "jpeg2000": "jp2"}
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class ImagePlaces:
    """Where the pictures of the new file are."""

    output: str
    """The new file; its pictures are looked for from its folder on."""
    copies: str
    """The folder of copies, beside it."""
    mode: str = AUTO
    """auto: references where they lead to the same file, else copies; copy; embed: data: URIs."""


def line_of(
    document: Document, values: Mapping[str, Any], name: Callable[[ImagePart], str]
) -> bytes:
    """The line of a document, with its line break.

    Args:
        document: The document.
        values: Keys beside it.
        name: What the line calls a picture.

    Raises:
        ImageError: A picture that is copied cannot be read.
    """
    record: dict[str, Any] = {"id": document.id, "source": document.corpus_name}
    parts = [_part(part, name) for part in document.content]
    if document.roles is None:
        record["content"] = parts
    elif document.pair is not None:  # two whole conversations, which a reader joins again
        at = document.pair.rejected
        record["chosen"] = _messages(parts[:at], document.roles[:at])
        record["rejected"] = _messages(parts[at:], document.roles[at:])
    else:
        record["messages"] = _messages(parts, document.roles)
    record.update(values)
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # lone surrogates, and numbers of more than 64 bits
        return json.dumps(record, default=str).encode("ascii") + b"\n"


def _part(part: TextPart | ImagePart, name: Callable[[ImagePart], str]) -> dict[str, str]:
    if isinstance(part, ImagePart):
        return {"type": "image", "image": name(part)}
    # a reader removes one byte order mark
    kept = _BYTE_ORDER_MARK if part.text.startswith(_BYTE_ORDER_MARK) else ""
    return {"type": "text", "text": kept + part.text}


def _messages(parts: Sequence[dict[str, str]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Messages of adjacent parts of one role, which take turns."""
    messages: list[dict[str, Any]] = []
    for part, role in zip(parts, roles, strict=True):
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(part)
    if messages[0]["role"] == SYSTEM:  # a reader adds the empty line behind it
        assert messages[0]["content"].pop()["text"] == BEHIND_SYSTEM
    return messages


class ImageNamer:
    """Names the pictures of new lines, and copies those that must be copied.

    Args:
        places: Where they go.
    """

    def __init__(self, places: ImagePlaces) -> None:
        self._places = places
        self._home = Path(places.output).parent.resolve()
        self.copied: set[str] = set()
        """Names of copies in their folder."""

    def name(self, part: ImagePart) -> str:
        """What a line calls a picture.

        Raises:
            ImageError: It cannot be read.
            DataError: It cannot be copied.
        """
        if self._places.mode == AUTO and (found := self._reference(part)) is not None:
            return found
        data = part.read()
        kind = suffix_of(data)
        if self._places.mode == EMBED:
            return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest[:2]}/{digest}.{kind}"
        path = Path(self._places.copies) / name
        if name not in self.copied and not _has_size(path, len(data)):
            write_bytes(path, data)
        self.copied.add(name)
        return f"{Path(self._places.copies).name}/{name}"

    def _reference(self, part: ImagePart) -> str | None:
        """The path from the new file to a picture's file; None if it needs a copy."""
        if part.folder is None or isinstance(part.image, bytes) or not part.reference:
            return None
        path = _local_path(part.reference, part.folder)
        if path is None:
            return None
        try:
            relative = path.resolve(strict=True).relative_to(self._home).as_posix()
        except (OSError, ValueError, RuntimeError):
            return None
        return f"./{relative}" if is_url(relative) or relative[:5].lower() == "data:" else relative


def _local_path(reference: str, folder: ImageFolder) -> Path | None:
    """The file that a reference names, if it is a local one."""
    if is_url(reference):
        found = file_url_path(reference)
        return None if found is None or "%" in found else Path(found)
    if reference.startswith("/"):
        return Path(reference)
    for place in (folder.path, *folder.options.roots):
        if is_url(place):
            return None
        try:
            if (path := Path(place) / reference).exists():
                return path
        except (OSError, ValueError):
            return None
    return None


def _has_size(path: Path, size: int) -> bool:
    """Whether an earlier run has made this copy; its name says what it holds."""
    try:
        return not path.is_symlink() and path.stat().st_size == size
    except OSError:
        return False


def suffix_of(data: bytes) -> str:
    """The usual suffix of an image file, without its dot: png if the format is not known."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "png").lower()
    except Exception:  # Pillow's decoders raise all kinds of exceptions
        return "png"
    return _SUFFIXES.get(kind, kind)
