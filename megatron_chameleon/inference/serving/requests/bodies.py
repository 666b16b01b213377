"""The two kinds of requests, read from their JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.serving.requests.fields import Fields
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.messages import Piece, read_messages
from megatron_chameleon.inference.serving.requests.refusal import bad
from megatron_chameleon.inference.serving.requests.sampling import Wishes, read_wishes
from megatron_chameleon.inference.serving.requests.unsupported import IGNORED, refuse_unsupported

FORMATS = ("chat", "document")
_MOST_IDS = 1 << 20
"""Token ids of a prompt, before anybody looks at each of them."""


@dataclass(frozen=True)
class ChatBody:
    """A request of ``/v1/chat/completions``."""

    wishes: Wishes
    pieces: list[Piece]
    format: str | None
    """None is that of the model."""


@dataclass(frozen=True)
class CompletionBody:
    """A request of ``/v1/completions``."""

    wishes: Wishes
    prompts: list[str | list[int]]


def read_chat(
    values: Mapping[str, Any], defaults: GenerationOptions, limits: Limits, remote: bool
) -> ChatBody:
    """Read a chat.

    Args:
        values: The JSON object.
        defaults: How answers are drawn unless the request says.
        limits: Of the server.
        remote: Whether images may be fetched from the web.

    Raises:
        Refusal: It cannot be served.
    """
    fields = Fields(values)
    refuse_unsupported(fields)
    wishes = read_wishes(fields, defaults, limits)
    form = fields.choice("format", FORMATS)
    messages = fields.get("messages")
    fields.refuse_rest(IGNORED)
    return ChatBody(wishes, read_messages(messages, limits, remote), form)


def read_completion(
    values: Mapping[str, Any], defaults: GenerationOptions, limits: Limits
) -> CompletionBody:
    """Read a completion; the arguments are those of ``read_chat``.

    Raises:
        Refusal: It cannot be served.
    """
    fields = Fields(values)
    refuse_unsupported(fields)
    wishes = read_wishes(fields, defaults, limits)
    prompt = fields.get("prompt")
    if fields.has("messages"):
        raise bad("messages", "a completion has a prompt", "Send it to /v1/chat/completions")
    if fields.choice("format", FORMATS) == "chat":
        raise bad("format", "a completion continues a document", "Use /v1/chat/completions")
    fields.refuse_rest(IGNORED)
    prompts = _prompts(prompt)
    if len(prompts) * wishes.answers > limits.answers:
        count = len(prompts) * wishes.answers
        what = f"{len(prompts):,} prompts with n = {wishes.answers:,} have {count:,} answers"
        remedy = f"Ask for at most {limits.answers:,} in one request"
        raise bad("prompt", what, remedy)
    return CompletionBody(wishes, prompts)


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and len(value) > _MOST_IDS:
        what = f"it is a list of {len(value):,}, and the limit is {_MOST_IDS:,}"
        raise bad("prompt", what, "Shorten it", "context_length_exceeded")
    if isinstance(value, list) and value:
        if all(_is_id(token_id) for token_id in value):
            return [value]
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(_are_ids(prompt) for prompt in value):
            return value
    what = "it is missing" if value is None else "it is neither a text nor a list of token ids"
    raise bad("prompt", what, "Send a string, a list of strings, token ids, or lists of token ids")


def _are_ids(value: Any) -> bool:
    is_list = isinstance(value, list) and 0 < len(value) <= _MOST_IDS
    return is_list and all(_is_id(token_id) for token_id in value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
