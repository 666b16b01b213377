"""The messages of a chat: roles, texts and images in order."""

from dataclasses import dataclass
from typing import Any

from megatron_chameleon.data.documents.schema import (
    ASSISTANT,
    BEHIND_SYSTEM,
    SYSTEM,
    USER,
)
from megatron_chameleon.inference.serving.requests.fields import Fields
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.pictures import Picture, read_picture
from megatron_chameleon.inference.serving.requests.refusal import bad
from megatron_chameleon.wording import shown

_ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
MOST_PARTS = 1024
"""Of one message."""
_TOOL_ROLES = ("tool", "function")
_PART = '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'


@dataclass(frozen=True)
class Piece:
    """A text or an image of a message."""

    role: str
    content: str | Picture


def read_messages(value: Any, limits: Limits, remote: bool) -> list[Piece]:
    """Read ``messages``.

    Messages of one role behind each other become one turn, with a blank line between their texts.

    Args:
        value: The field.
        limits: Of the server.
        remote: Whether images may be fetched from the web.

    Raises:
        Refusal: They are malformed, out of order or above a limit.
    """
    if not isinstance(value, list) or not value:
        what = "it is missing or empty" if value in (None, []) else "it is not a list"
        raise bad("messages", what, 'Send a list such as [{"role": "user", "content": "..."}]')
    if len(value) > limits.messages:
        what = f"it has {len(value):,} messages, and the limit is {limits.messages:,}"
        raise bad("messages", what, "Send fewer, or start the server with a larger --max-messages")
    pieces: list[Piece] = []
    before: str | None = None
    images = 0
    for number, message in enumerate(value):
        path = f"messages[{number}]"
        if not isinstance(message, dict):
            raise bad(path, "it is not an object", 'Send {"role": ..., "content": ...}')
        fields = Fields(message, f"{path}.")
        role = _role(fields, before)
        content = _content(fields, role, limits, remote)
        images += sum(isinstance(part, Picture) for part in content)
        if images > limits.images:
            what = f"the request has more than {limits.images:,} images"
            raise bad("messages", what, "Send fewer, or start the server with larger --max-images")
        if role == before:
            pieces.append(Piece(role, BEHIND_SYSTEM))
        elif before == SYSTEM:
            pieces.append(Piece(SYSTEM, BEHIND_SYSTEM))
        pieces += [Piece(role, part) for part in content]
        before = role
    if before != USER:
        what = f"the last message is the {before}'s, so there is nothing to answer"
        raise bad("messages", what, "End with a message of the user")
    return pieces


def _role(fields: Fields, before: str | None) -> str:
    """The role of a message, which must be able to stand behind the one before."""
    word = fields.text("role")
    if word is None:
        raise fields.wrong("role", "it is missing", "Write user, assistant or system")
    if word in _TOOL_ROLES:
        what = "the model has not been trained on the results of tools"
        raise fields.wrong("role", what, "Write the result into a message of the user")
    if word not in _ROLES:
        what = f"{shown(word)} is not a role"
        raise fields.wrong("role", what, "Write user, assistant, system or developer")
    role = _ROLES[word]
    if role == SYSTEM and before not in (None, SYSTEM):
        what = "a system message comes behind other messages"
        raise fields.wrong("role", what, "Put it first, or make it part of the user's message")
    if role == ASSISTANT and before not in (USER, ASSISTANT):
        what = "a message of the assistant comes before any of the user"
        raise fields.wrong("role", what, "Put a message of the user before it")
    return role


def _content(fields: Fields, role: str, limits: Limits, remote: bool) -> list[str | Picture]:
    for name in ("tool_calls", "function_call", "audio"):
        if fields.get(name):
            raise fields.wrong(name, "it is not supported", "Write what happened as text")
    value = fields.get("content")
    for name in ("name", "refusal", "annotations", "tool_calls", "function_call"):
        fields.get(name)
    fields.refuse_rest(("name", "id"))
    if isinstance(value, str):
        parts: list[str | Picture] = [value]
    elif isinstance(value, list):
        if len(value) > MOST_PARTS:
            what = f"it has {len(value):,} parts, and the limit is {MOST_PARTS:,}"
            raise fields.wrong("content", what, "Join its texts")
        parts = [
            _part(part, f"{fields.path}content[{number}]", role, limits, remote)
            for number, part in enumerate(value)
        ]
    elif value is None:
        raise fields.wrong("content", "it is missing", "Send a text, or a list of parts")
    else:
        raise fields.wrong("content", "it is neither a string nor a list", f"Send {_PART}")
    if not any(isinstance(part, Picture) or part.strip() for part in parts):
        raise fields.wrong("content", "it has no text and no image", "Send at least one of them")
    return parts


def _part(value: Any, path: str, role: str, limits: Limits, remote: bool) -> str | Picture:
    if not isinstance(value, dict):
        raise bad(path, "it is not an object", f"Send {_PART}")
    fields = Fields(value, f"{path}.")
    kind = fields.text("type")
    if kind == "text":
        text = fields.text("text")
        if text is None:
            raise fields.wrong("text", "it is missing", 'Send {"type": "text", "text": "..."}')
        fields.refuse_rest(("annotations", "id"))
        return text
    if kind != "image_url":
        what = "it is missing" if kind is None else f"{shown(kind)} is not supported"
        raise fields.wrong("type", what, f"Send {_PART}")
    if role == SYSTEM:
        what = "a system message has an image"
        raise bad(path, what, "Put the image into a message of the user")
    url = _url(fields)
    # what the server itself says of an image, and a client sends back
    fields.refuse_rest(("id", "index", "complete", "progress"))
    return read_picture(url, f"{path}.image_url", limits, remote)


def _url(fields: Fields) -> str:
    remedy = 'Send {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    value = fields.get("image_url")
    if isinstance(value, str):
        return value
    inner = fields.object("image_url") if isinstance(value, dict) else None
    if inner is None:
        raise fields.wrong("image_url", "it is not an object with a url", remedy)
    url = inner.text("url")
    if url is None:
        raise inner.wrong("url", "it is missing", remedy)
    inner.refuse_rest(("detail",))
    return url
