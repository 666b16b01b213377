"""Reads messages and parts, in the spellings of several libraries.

{"role": "user", "content": "... or parts"}          OpenAI, Hugging Face
{"from": "human", "value": "..."}                    ShareGPT, LLaVA

{"type": "text", "text": "..."}
{"type": "image", "image": "PATH, data: URI or {bytes, path}"}
{"type": "image"}                                    the next picture of the key `images`
{"type": "image_url", "image_url": {"url": "PATH or data: URI"}}
{"type": "image", "source": {"type": "base64", "data": "..."}}    Anthropic
{"image": "PATH"}, {"text": "..."}                                Qwen

Messages of the developer are system messages. A conversation with a tool or a call of one is left
out as a whole: the format has the roles of prompt and answer only, and neither would be right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.pictures import (
    Mark,
    Part,
    find_beside,
    place_pictures,
    read_picture,
    shown_key,
)
from megatron_chameleon.data.documents.schema import (
    ASSISTANT,
    BEHIND_SYSTEM,
    SYSTEM,
    USER,
    TextPart,
    UnusableDocument,
)
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.references import ImageFolder

_ROLES: Mapping[str, str] = {
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
    **dict.fromkeys((USER, "human"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "model"), ASSISTANT),
}
_TOOL_ROLES = frozenset(
    ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
)
TOOL_CALL = "call of a tool"
"""Why a conversation with tools is dropped: the format has no token for who speaks but two."""
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TOOL_KEYS = ("tool_calls", "function_call")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_SOURCES = ("image", "image_url", "url", "path", "bytes", "data", "base64", "file", "source")
"""Where an image part holds its picture; the first one with a value counts."""

Names = tuple[str, ...]
Messages = tuple[tuple[Part, ...], tuple[str, ...], set[str]]


def parse_messages(value: Any, folder: ImageFolder, where: str, names: Names = ()) -> Messages:
    """Parse messages: their parts in order, the role of each part, and keys that are not read.

    Args:
        value: The list of messages.
        folder: Where references to images start from.
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
    parts: list[Part] = []
    roles: list[str] = []
    unused: set[str] = set()
    for position, message in enumerate(value):
        name = names[position] if names else f"messages[{position}]"
        role, content = _role_and_content(message, name, where)
        _check_order(role, roles[-1] if roles else None, name, where)
        told = name if names else "content"
        found = parse_content(content, folder, where, told, unused)
        beside = find_beside(message, {*_ROLE_KEYS, *_CONTENT_KEYS}, folder, where)
        unused.update(f"messages.{key}" for key in beside.unused_keys)
        if beside.has_key or beside.pictures:
            found = tuple(place_pictures(found, None, beside, where)[0])
        if not any(not isinstance(part, TextPart) or part.text.strip() for part in found):
            remedy = "Write text or an image, or leave the document out"
            raise DataError(where, f"{name} ({role}) is empty", remedy)
        if role == SYSTEM:
            found = (*found, TextPart(BEHIND_SYSTEM))
        parts.extend(found)
        roles.extend([role] * len(found))
    return tuple(parts), tuple(roles), unused


def _role_and_content(message: Any, name: str, where: str) -> tuple[str, Any]:
    """The role, in our words, and the content of a message."""
    fields = message if isinstance(message, dict) else {}
    role = next((fields[key] for key in _ROLE_KEYS if fields.get(key) is not None), None)
    key = next((key for key in _CONTENT_KEYS if fields.get(key) is not None), None)
    if tools := [key for key in _TOOL_KEYS if fields.get(key)]:
        raise _tool_error(f"{name} has {tools[0]}", where)
    if not isinstance(role, str) or key is None:
        what = f"{name} must be an object with a role and content"
        raise DataError(where, what, 'Write {"role": "user", "content": ...}')
    if role.lower() in _TOOL_ROLES:
        raise _tool_error(f"{name} is from the role {shown_key(role)!r}", where)
    if role.lower() not in _ROLES:
        what = f"{name} has the unknown role {shown_key(role)!r}"
        raise DataError(where, what, "Write user, assistant or system")
    return _ROLES[role.lower()], fields[key]


def _tool_error(what: str, where: str) -> UnusableDocument:
    remedy = "Remove the document, or write the call as text"
    return UnusableDocument(where, f"{what}, and calls of tools are not read", remedy, TOOL_CALL)


def _check_order(role: str, before: str | None, name: str, where: str) -> None:
    """Refuse a message that cannot follow the previous message."""
    if role == SYSTEM and before == SYSTEM:  # a system message, then one of the developer
        return
    if role == SYSTEM and before is not None:
        what = f"{name} is a system message after other messages"
        raise DataError(where, what, "Put the one system message first")
    if role == before:
        what = f"{name} is from the {role}, like the message before it"
        raise DataError(where, what, "Join the two, because user and assistant must take turns")
    if role == ASSISTANT and before != USER:
        what = f"{name} is from the assistant, but no user message comes before it"
        raise DataError(where, what, "Put a user message before it")


def parse_content(
    value: Any,
    folder: ImageFolder,
    where: str,
    name: str = "content",
    unused: set[str] | None = None,
) -> tuple[Part, ...]:
    """Parse content: a text, or a list of text and image parts.

    Args:
        value: The content.
        folder: Where references to images start from.
        where: File and line, for errors.
        name: What errors call it.
        unused: Receives the keys of parts that are not read.

    Raises:
        DataError: It is neither.
    """
    if isinstance(value, str):
        return (TextPart(value.removeprefix("\ufeff")),)
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            f"{name} must be a list with at least one part",
            "Write a list of text and image parts",
        )
    return tuple(
        _parse_part(part, f"{name}[{position}]", folder, where, unused)
        for position, part in enumerate(value)
    )


def _parse_part(
    part: Any, name: str, folder: ImageFolder, where: str, unused: set[str] | None
) -> TextPart | ImagePart | Mark:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None and isinstance(part, dict):  # as Qwen writes it: {"image": ...}, {"text": ...}
        given = [key for key in ("text", "image") if part.get(key) is not None]
        kind = given[0] if len(given) == 1 else None
    if kind not in (*_TEXT_TYPES, *_IMAGE_TYPES):
        what = (
            f"{name} has the unknown type {shown_key(kind) if isinstance(kind, str) else kind!r}"
            if kind is not None
            else f"{name} must be an object with a type"
        )
        raise DataError(
            where, what, 'Write {"type": "text", "text": ...} or {"type": "image", "image": ...}'
        )
    if kind in _TEXT_TYPES:
        text = part.get("text")
        if not isinstance(text, str):
            remedy = 'Write {"type": "text", "text": "..."}'
            raise DataError(where, f"{name} has no string under the key 'text'", remedy)
        _check_rest(part, {"type", "text"}, folder, where, unused)
        return TextPart(text.removeprefix("\ufeff"))
    _check_rest(part, {"type", *_SOURCES}, folder, where, unused)
    source = next((key for key in _SOURCES if part.get(key) is not None), None)
    return Mark() if source is None else read_picture(part[source], source, folder, where)


def _check_rest(
    part: Mapping[str, Any],
    used: set[str],
    folder: ImageFolder,
    where: str,
    unused: set[str] | None,
) -> None:
    """Refuse pictures in keys of a part that are not read, and list the other such keys."""
    if len(part) <= len(used) and part.keys() <= used:
        return
    beside = find_beside(part, used, folder, where)
    if beside.pictures:
        key = next(key for key in part if key not in used and part[key] is not None)
        what = f"a part has a picture in the key {shown_key(key)}, which is not read"
        raise DataError(where, what, "Write pictures as parts of the type image")
    if unused is not None:
        unused.update(f"content.{key}" for key in beside.unused_keys)


def join_texts(parts: Sequence[Part]) -> str:
    """The texts of parts, without the images between them."""
    return "".join(part.text for part in parts if isinstance(part, TextPart))
