"""Documents: text and images in reading order. Everything starts from them.

A document is one line of JSON in one of four forms, which differ in their keys. The keys ``id`` and
``source`` (the name of the corpus) are optional, and other keys are ignored:

    {"content": [{"type": "text", "text": "..."}, {"type": "image", "image": "PATH or data: URI"}]}
    {"text": "..."}
    {"messages": [{"role": "user", "content": "... or parts as above"}, {"role": "assistant", ...}]}
    {"prompt": "... or parts as above", "answer": "... or parts as above"}

The last two are conversations (``conversations.py``). A line that breaks the schema is an error
that names the file and the line. ``image_part.py`` opens images, and ``parse.py`` reads the other
kinds of record.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_chameleon.data.documents.image_part import (
    ImagePart,
    folder_of,
    image_part,
    one_line,
)
from megatron_chameleon.errors import DataError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
"""The roles in a conversation."""
BEHIND_SYSTEM = "\n\n"
"""Text between a system message and its prompt."""


@dataclass(slots=True)
class TextPart:
    text: str


@dataclass(slots=True)
class Document:
    id: str
    corpus_name: str
    """The key ``source``, or the file's name up to its first dot."""
    content: tuple[TextPart | ImagePart, ...]
    where: str
    """The file and the line, key or row that it was read from."""
    roles: tuple[str, ...] | None = None
    """The speaker of each part of a conversation; None for other documents."""
    record: int = 0
    """Line, sample or row of its file, counted from 1."""


def parse_line(line: bytes, path: str | Path, number: int) -> Document:
    """Turn one line of JSON into a document.

    Args:
        line: UTF-8 text of one JSON object.
        path: The file or URL, for relative image paths and errors.
        number: The number of the line, counted from 1.

    Raises:
        DataError: If the line is not a JSON object or breaks the schema.
    """
    where = f"{path}:{number}"
    record = _parse_json(line, where, number)
    kinds: tuple[str, ...] = ("content", "text", "messages")
    found = [key for key in kinds if key in record]
    if not found and "prompt" in record:
        found = ["prompt"]
    if len(found) != 1:
        what = f"has the keys {' and '.join(found)} at once"
        if not found:
            keys = ", ".join(record)[:200] or "no key"
            what = f"has none of the keys content, text, messages and prompt (it has {keys})"
        raise DataError(where, what, "Write content, text, messages, or prompt and answer")
    name = str(path).rsplit("/", 1)[-1]
    document_id = record_name(record, "id", f"{name}:{number}", where)
    corpus_name = record_name(record, "source", name.split(".")[0], where)
    content, roles = _parts_and_roles(record, found[0], folder_of(path), where)
    return Document(document_id, corpus_name, content, where, roles, number)


def _parts_and_roles(
    record: dict[str, Any], key: str, folder: str, where: str
) -> tuple[tuple[TextPart | ImagePart, ...], tuple[str, ...] | None]:
    """The parts of a document and, for conversations, their roles; ``key`` tells the form."""
    value = record[key]
    if key == "text":
        if not isinstance(value, str):
            what = f"text must be a string, not {type(value).__name__}"
            raise DataError(where, what, "Write it as a string")
        return (TextPart(value),), None
    if key == "messages":
        return parse_messages(value, folder, where)
    if key == "prompt":
        messages = [{"role": USER, "content": value}]
        if "answer" in record:
            messages.append({"role": ASSISTANT, "content": record["answer"]})
        return parse_messages(messages, folder, where, ("prompt", "answer"))
    return _parse_content(value, folder, where), None


def _parse_json(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # orjson refuses lone surrogates, NaN and byte order marks
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            what = f"the line is not valid JSON ({one_line(error)})"
            raise DataError(where, what, "Fix or remove the line") from error
    if not isinstance(record, dict):
        what = f"the line must be a JSON object, not {type(record).__name__}"
        raise DataError(where, what, "Write one JSON object per line")
    return record


def record_name(record: dict[str, Any], key: str, default: str, where: str) -> str:
    """The id or the corpus name of a record; ``default`` if it has none."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str | int):
        raise DataError(
            where,
            f"{key} must be a string, not {type(value).__name__}",
            "Write it as a string, or leave it out",
        )
    return str(value)


def parse_messages(
    value: Any, folder: str, where: str, names: tuple[str, ...] = ()
) -> tuple[tuple[TextPart | ImagePart, ...], tuple[str, ...]]:
    """Parse messages: their parts in order, and the role of each part.

    Args:
        value: The value of the key ``messages``.
        folder: The folder or URL of the file of documents.
        where: File and line, for errors.
        names: What errors call each message; if empty, they use its place in the list.

    Raises:
        DataError: If these are not messages, or their order is wrong.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            "messages must be a list with at least one message",
            "Write a list of objects with role and content",
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
            what = f"{name} must be an object with a role and content"
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
    """Refuse a message with an unknown role, or one that cannot follow the previous message."""
    if role not in (SYSTEM, USER, ASSISTANT):
        what = f"{name} has the unknown role {role[:40]!r}"
        raise DataError(where, what, "Write user, assistant or system")
    if role == SYSTEM and before is not None:
        what = f"{name} is a system message after other messages"
        raise DataError(where, what, "Put the one system message first")
    if role == before:
        what = f"{name} is from the {role}, like the message before it"
        raise DataError(where, what, "Join the two, because user and assistant must take turns")
    if role == ASSISTANT and before != USER:
        what = f"{name} is from the assistant, but no user message comes before it"
        raise DataError(where, what, "Put a user message before it")


def _parse_content(
    value: Any, folder: str, where: str, name: str = "content"
) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(value, str):
        return (TextPart(value),)
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            f"{name} must be a list with at least one part",
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
            f"{name} has the unknown type {kind!r}"
            if kind is not None
            else f"{name} must be an object with a type"
        )
        raise DataError(
            where, what, 'Write {"type": "text", "text": ...} or {"type": "image", "image": ...}'
        )
    value = part.get(kind)
    if not isinstance(value, str):
        remedy = f'Write {{"type": "{kind}", "{kind}": "..."}}'
        raise DataError(where, f"{name} has no string under the key {kind!r}", remedy)
    return TextPart(value) if kind == "text" else image_part(value, folder, where)
