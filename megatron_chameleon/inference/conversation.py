"""A conversation that grows: messages of the user, and the answers of a model."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import (
    ASSISTANT,
    BEHIND_SYSTEM,
    SYSTEM,
    USER,
    Document,
    TextPart,
)
from megatron_chameleon.images.png import data_url, png_bytes
from megatron_chameleon.inference.answers.stream import DrawnImage
from megatron_chameleon.inference.chat import EncodedImage, PromptFormat, prompt_of
from megatron_chameleon.inference.prompts import PromptPart, image_tokenizer_of
from megatron_chameleon.tokenizer.folder import Tokenizer

Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """What one of the two said."""

    parts: tuple[Part, ...]
    is_complete: bool = True
    """Whether the model ended its answer itself."""


class Conversation:
    """Messages in turn, beginning with the user's.

    Each image is encoded once, and an image of the model keeps the codes that the model drew: it
    would get others if its pixels were encoded again.

    For a model that takes a prompt for a document, an answer that the model ended is the end of the
    document, and the next message begins another one. Such a model has not seen anything behind the
    end of a document.

    Args:
        tokenizer: The model's.
        form: What the model takes a prompt for.
        system: Text before the first message; empty for none.
    """

    def __init__(self, tokenizer: Tokenizer, form: PromptFormat, system: str = "") -> None:
        self._tokenizer, self._form = tokenizer, form
        self.system = system
        self._messages: list[Message] = []
        """The user's at even places, the model's at odd ones."""

    def __len__(self) -> int:
        """The number of messages, of both."""
        return len(self._messages)

    def say(self, parts: Sequence[Part]) -> None:
        """Add a message of the user.

        Args:
            parts: At least one.

        Raises:
            ImageError, DataError: An image cannot be read, or the model has no images. Nothing is
                added then.
        """
        assert len(self) % 2 == 0
        self._messages.append(Message(tuple(self._encoded(part) for part in parts)))

    def answer(
        self,
        parts: Sequence[str | DrawnImage],
        images: Sequence[Image.Image],
        is_complete: bool = True,
    ) -> None:
        """Add the model's answer to the last message.

        Args:
            parts: Texts and drawn images; at least one.
            images: The pixels of the drawn images, in order.
            is_complete: Whether the model ended it itself.
        """
        assert len(self) % 2 == 1
        pictures = iter(images)
        found: list[Part] = [
            TextPart(part) if isinstance(part, str) else _drawn(part, next(pictures))
            for part in parts
        ]
        self._messages.append(Message(tuple(found), is_complete))

    def take_back(self, messages: int) -> list[Message]:
        """Remove the last messages and return them."""
        removed = self._messages[-messages:]
        del self._messages[-messages:]
        return removed

    def put_back(self, messages: Sequence[Message]) -> None:
        """Add messages that were taken back."""
        self._messages += messages

    def clear(self, system: str | None = None) -> None:
        """Begin anew, behind another system message if there is one; an empty text removes it."""
        self._messages = []
        if system is not None:
            self.system = system

    def prompt(self) -> list[PromptPart]:
        """The prompt for the next answer, after a message of the user."""
        return list(prompt_of(self._documents()[-1], self._tokenizer, self._form))

    def records(self) -> list[dict[str, Any]]:
        """The conversation as a document of our schema, with its images inside.

        A model that knows no conversations gets back the documents that it wrote, without roles.
        """
        beginning = {"id": "chat", "source": "chameleon chat"}
        if self._form is PromptFormat.DOCUMENT:
            return [
                {**beginning, "content": [_written(part) for part in document.content]}
                for document in self._documents()
            ]
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": SYSTEM, "content": self.system})
        for place, message in enumerate(self._messages):
            role = ASSISTANT if place % 2 else USER
            messages.append({"role": role, "content": [_written(part) for part in message.parts]})
        return [{**beginning, "messages": messages}]

    def _documents(self) -> list[Document]:
        """All messages; the last document is the one that goes on."""
        ends = [
            place + 1
            for place, message in enumerate(self._messages[:-1])
            if place % 2 and message.is_complete and self._form is PromptFormat.DOCUMENT
        ]
        places = [0, *ends, len(self._messages)]
        return [self._document(first, stop) for first, stop in itertools.pairwise(places)]

    def _document(self, first: int, stop: int) -> Document:
        content: list[Part] = []
        roles: list[str] = []
        if self.system:
            content += [TextPart(self.system), TextPart(BEHIND_SYSTEM)]
            roles += [SYSTEM, SYSTEM]
        for place in range(first, stop):
            parts = self._messages[place].parts
            content += parts
            roles += [ASSISTANT if place % 2 else USER] * len(parts)
        return Document("chat", "chameleon chat", tuple(content), "the conversation", tuple(roles))

    def _encoded(self, part: Part) -> Part:
        if isinstance(part, TextPart):
            return part
        tokenizer = image_tokenizer_of(self._tokenizer)
        data = part.read()
        pad = self._form is PromptFormat.CHAT
        _, pixels = tokenizer.prepare(part.decode(data), pad=pad)
        ((grid, codes),) = tokenizer.encode_shaped([Image.fromarray(pixels)])
        return EncodedImage(data, part.options, codes=codes, grid=grid)


def _drawn(drawn: DrawnImage, image: Image.Image) -> EncodedImage:
    return EncodedImage(png_bytes(image), codes=drawn.codes, grid=drawn.grid)


def _written(part: Part) -> dict[str, str]:
    """A part as JSON has it; an image becomes a data: URI of its file."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    assert isinstance(part.image, bytes), "images are read when they come into the conversation"
    kind = (Image.open(io.BytesIO(part.image)).get_format_mimetype() or "image/png").lower()
    return {"type": "image", "image": data_url(part.image, kind)}
