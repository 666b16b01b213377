"""The objects that answers are sent in: OpenAI's chat completions and completions.

An image is a part ``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``. In
a stream it comes beside the text, in ``images``, so that clients that know only text read every
chunk.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_chameleon.inference.engine.interface import FinishReason

Part = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Reply:
    """One whole answer."""

    parts: Sequence[Part]
    """Texts and images in order."""
    reason: FinishReason
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Envelope:
    """What all objects of one response have in common."""

    model: str
    prompts: Sequence[Sequence[int]]
    answers: int
    """For each prompt."""
    with_token_ids: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def prompt_of(self, index: int) -> list[int]:
        """The token ids of the prompt that answer ``index`` belongs to."""
        return list(self.prompts[index // self.answers])


class Format(Protocol):
    """How one kind of request is answered."""

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        """The object that is not a stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token."""

    def text(self, index: int, text: str) -> dict[str, Any]:
        """The next characters of an answer."""

    def image(self, index: int, part: Part) -> dict[str, Any]:
        """An image of an answer."""

    def closing(self, index: int, reason: FinishReason, token_ids: Sequence[int]) -> dict[str, Any]:
        """The end of an answer."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream, if it was asked for."""


class ChatFormat:
    """``chat.completion`` and its chunks."""

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(replies):
            message = {"role": "assistant", "content": content_of(reply.parts), "refusal": None}
            choice = {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": reply.reason.value,
            }
            if self._envelope.with_token_ids:
                choice["token_ids"] = list(reply.token_ids)
            choices.append(choice)
        head = self._envelope.head("chatcmpl", "chat.completion")
        body = {**head, "choices": choices, "usage": usage.body()}
        if self._envelope.with_token_ids:
            body["prompt_token_ids"] = self._envelope.prompt_of(0)
        return body

    def opening(self, index: int) -> dict[str, Any] | None:
        chunk = self._chunk(index, {"role": "assistant", "content": ""})
        if self._envelope.with_token_ids and index == 0:
            chunk["prompt_token_ids"] = self._envelope.prompt_of(0)
        return chunk

    def text(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text})

    def image(self, index: int, part: Part) -> dict[str, Any]:
        return self._chunk(index, {"content": None, "images": [part]})

    def closing(self, index: int, reason: FinishReason, token_ids: Sequence[int]) -> dict[str, Any]:
        chunk = self._chunk(index, {}, reason.value)
        if self._envelope.with_token_ids:
            chunk["choices"][0]["token_ids"] = list(token_ids)
        return chunk

    def usage(self, usage: Usage) -> dict[str, Any]:
        head = self._envelope.head("chatcmpl", "chat.completion.chunk")
        return {**head, "choices": [], "usage": usage.body()}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {
            **self._envelope.head("chatcmpl", "chat.completion.chunk"),
            "choices": [choice],
        }


class CompletionFormat:
    """``text_completion``, whole and in a stream.

    ``text`` has the texts of an answer. If it has images, ``content`` has everything in order.
    """

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(replies):
            text = "".join(part["text"] for part in reply.parts if part["type"] == "text")
            choice = self._choice(index, text, reply.reason.value)
            content = content_of(reply.parts)
            if not isinstance(content, str):
                choice["content"] = content
            if self._envelope.with_token_ids:
                choice["token_ids"] = list(reply.token_ids)
                choice["prompt_token_ids"] = self._envelope.prompt_of(index)
            choices.append(choice)
        return {**self._head(), "choices": choices, "usage": usage.body()}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def text(self, index: int, text: str) -> dict[str, Any]:
        return {**self._head(), "choices": [self._choice(index, text)]}

    def image(self, index: int, part: Part) -> dict[str, Any]:
        choice = {**self._choice(index, ""), "images": [part]}
        return {**self._head(), "choices": [choice]}

    def closing(self, index: int, reason: FinishReason, token_ids: Sequence[int]) -> dict[str, Any]:
        choice = self._choice(index, "", reason.value)
        if self._envelope.with_token_ids:
            choice["token_ids"] = list(token_ids)
            choice["prompt_token_ids"] = self._envelope.prompt_of(index)
        return {**self._head(), "choices": [choice]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": usage.body()}

    def _head(self) -> dict[str, Any]:
        return self._envelope.head("cmpl", "text_completion")

    def _choice(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def image_part(url: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url}}


def content_of(parts: Sequence[Part]) -> str | list[Part]:
    """An answer's content: a string if it is text alone, else its parts."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return list(parts)
