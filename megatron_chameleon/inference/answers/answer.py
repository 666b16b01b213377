"""Whole answers, put together from the events of their streams."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_chameleon.inference.answers.stream import (
    AnswerEvent,
    AnswerStream,
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


def content_of(events: Iterable[AnswerEvent]) -> list[str | np.ndarray]:
    """The texts of an answer and the codes of its whole images, in order."""
    content: list[str | np.ndarray] = []
    texts: list[str] = []
    for event in events:
        if isinstance(event, TextDelta):
            texts.append(event.text)
        elif isinstance(event, ImageDone):
            content += [*_joined(texts), event.codes]
            texts = []
    return content + _joined(texts)


def _joined(texts: list[str]) -> list[str]:
    return ["".join(texts)] if texts else []


class AnswerBatch:
    """Reads the answers of a batch while they are drawn.

    Args:
        tokenizer: Of the model.
        rows: Number of answers.
        stop: Strings that end an answer; none of them is empty.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._streams = [AnswerStream(tokenizer, stop) for _ in range(rows)]
        self._events: list[list[AnswerEvent]] = [[] for _ in range(rows)]
        self._token_ids: list[list[int]] = [[] for _ in range(rows)]

    def take(self, new_tokens: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """Read the new tokens of each row.

        Returns:
            The new tokens of each row, without those behind the one that completes a stop string;
            and the rows in which one was completed.
        """
        kept, stopped = [], []
        for row, token_ids in enumerate(new_tokens):
            stream, before = self._streams[row], self._streams[row].token_count
            events = stream.feed(token_ids)
            self._events[row] += [event for event in events if not isinstance(event, ImageCodes)]
            kept.append(list(token_ids[: stream.token_count - before]))
            self._token_ids[row] += kept[-1]
            if stream.stopped_by is not None and kept[-1]:
                stopped.append(row)
        return kept, stopped

    def finish(self) -> list[Answer]:
        """The answers, which have no more tokens."""
        answers = []
        for stream, events, token_ids in zip(
            self._streams, self._events, self._token_ids, strict=True
        ):
            content = content_of([*events, *stream.finish()])
            answers.append(Answer([self._decoded(part) for part in content], token_ids))
        return answers

    def _decoded(self, part: str | np.ndarray) -> str | Image.Image:
        if isinstance(part, str):
            return part
        assert self._tokenizer.image is not None, "without it, a stream has no images"
        return self._tokenizer.image.decode(part[None])[0]
