"""Whole answers, put together from the events of their streams."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from megatron_chameleon.inference.answers.stream import (
    AnswerEnd,
    AnswerEvent,
    AnswerStream,
    DrawnImage,
    ImageCodes,
    ImageDone,
    TextDelta,
)
from megatron_chameleon.tokenizer.folder import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The model's answer to one prompt."""

    content: list[str | Image.Image]
    """Texts and images in order; a text is never empty."""
    token_ids: list[int]
    """The tokens as drawn, including ``</s>`` if it came."""


def content_of(events: Iterable[AnswerEvent]) -> list[str | DrawnImage]:
    """The texts of an answer and its whole images, in order."""
    content: list[str | DrawnImage] = []
    texts: list[str] = []
    for event in events:
        if isinstance(event, TextDelta):
            texts.append(event.text)
        elif isinstance(event, ImageDone):
            content += [*_joined(texts), event.image]
            texts = []
    return content + _joined(texts)


def decoded(image: DrawnImage, tokenizer: Tokenizer) -> Image.Image:
    """The pixels of an image of an answer.

    Args:
        image: Drawn by the tokenizer's model.
        tokenizer: With an image tokenizer that has a decoder.

    Raises:
        DataError: The codes are none of its.
    """
    assert tokenizer.image is not None, "without it, a stream has no images"
    return tokenizer.image.decode_shaped([image])[0]


def _joined(texts: list[str]) -> list[str]:
    return ["".join(texts)] if texts else []


class GrowingAnswer:
    """An answer while its tokens come.

    Args:
        tokenizer: Of the model.
        stop: Strings that end the answer; none of them is empty.

    Attributes:
        is_ended: Whether it has all of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = AnswerStream(tokenizer, stop)
        self._events: list[AnswerEvent] = []
        self._token_ids: list[int] = []
        self.is_ended = False

    def feed(
        self, token_ids: Sequence[int], *, is_last: bool, is_complete: bool
    ) -> list[AnswerEvent]:
        """Take the next tokens.

        Args:
            token_ids: Those behind the one that completes a stop string are dropped.
            is_last: Whether no more will come.
            is_complete: Whether the model ended the answer by the last of them.

        Returns:
            What is new, with an ``AnswerEnd`` as the last event.
        """
        before = self._stream.token_count
        events = self._stream.feed(token_ids)
        self._token_ids += token_ids[: self._stream.token_count - before]
        self.is_ended = is_last or self._stream.is_ended
        if self.is_ended:
            events += self._stream.finish()
            events.append(AnswerEnd(is_complete and self._stream.stopped_by is None))
        self._events += [event for event in events if not isinstance(event, ImageCodes)]
        return events

    def answer(self) -> Answer:
        """The answer, once it has ended."""
        content = [self._decoded(part) for part in content_of(self._events)]
        return Answer(content, self._token_ids)

    def _decoded(self, part: str | DrawnImage) -> str | Image.Image:
        return part if isinstance(part, str) else decoded(part, self._tokenizer)
