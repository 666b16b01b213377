"""Turn the tokens of an answer into texts and images while they arrive.

    stream = AnswerStream(tokenizer, stop=["\n\n"])
    for chunk in chunks:
        for event in stream.feed(chunk):
            ...
        if stream.is_ended:
            break
    rest = stream.finish()

The events do not depend on how the tokens are cut into chunks, except that a text may come in more
or fewer parts, and the codes of an image that grows more or less often.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.answers.stop_strings import StopStrings
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.text.incremental import IncrementalDecoder


class DrawnImage(NamedTuple):
    """A whole image of an answer."""

    grid: Grid
    codes: np.ndarray
    """int64 [grid.codes], in raster order."""


@dataclass(frozen=True)
class TextDelta:
    """The next characters; never empty, and never changed by what follows."""

    text: str


@dataclass(frozen=True)
class ImageStarted:
    """An image begins."""

    index: int
    """Of the image among those of the answer, from 0."""


@dataclass(frozen=True, eq=False)
class ImageCodes:
    """An image has grown; this comes once per chunk."""

    index: int
    codes: np.ndarray
    """int64, all codes so far in raster order."""
    grid: Grid
    """Rows and columns of the whole image."""


@dataclass(frozen=True, eq=False)
class ImageDone:
    """An image is whole."""

    index: int
    codes: np.ndarray
    """int64 [grid.codes], in raster order."""
    grid: Grid

    @property
    def image(self) -> DrawnImage:
        return DrawnImage(self.grid, self.codes)


@dataclass(frozen=True, eq=False)
class ImageIncomplete:
    """The answer was cut inside an image."""

    index: int
    codes: np.ndarray
    """int64, fewer than an image has; maybe none."""


@dataclass(frozen=True)
class AnswerEnd:
    """The last event of ``Session.stream``. An ``AnswerStream`` does not know why tokens end."""

    is_complete: bool
    """Whether the model ended the answer, and neither a stop string nor a limit did."""


AnswerEvent = TextDelta | ImageStarted | ImageCodes | ImageDone | ImageIncomplete | AnswerEnd


class AnswerStream:
    """Reads one answer.

    A text ends where an image begins, so a stop string is never found across one.

    Args:
        tokenizer: Of the model. Without an image tokenizer, an answer has no images.
        stop: Strings that end the answer; none of them is empty.

    Attributes:
        stopped_by: The stop string that ended the answer, or None.
        is_ended: Whether ``</s>`` or a stop string ended the answer. Further tokens are ignored.
        token_count: The tokens taken so far, up to the one that ended the answer, which counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._form = tokenizer.image_form
        self._text = IncrementalDecoder(tokenizer.text)
        self._stops = StopStrings(stop)
        self._place = OUTSIDE
        self._grid: Grid | None = None
        """Of the image that grows, as soon as it is known."""
        self._image = np.empty(0, np.int64)
        self._codes = 0
        self._images = 0
        self.is_ended = False
        self.token_count = 0

    @property
    def stopped_by(self) -> str | None:
        return self._stops.found

    def feed(self, token_ids: Sequence[int]) -> list[AnswerEvent]:
        """Take the next tokens.

        Args:
            token_ids: Any number of them, by the rules of ``engine/modality.py``.

        Raises:
            DataError: A token cannot come where it stands in an image.
        """
        events: list[AnswerEvent] = []
        text = ""
        for token_id in token_ids:
            if self.is_ended:
                break
            self.token_count += 1
            if self._place.is_inside:
                events += self._grow(token_id)
            elif token_id == self._tokenizer.vocabulary.begin_image and self._form.draws:
                text += self._end_text()
                self.is_ended = self._stops.found is not None
                if not self.is_ended:
                    events += [*_deltas(text), self._begin_image()]
                    text = ""
            elif token_id == self._tokenizer.vocabulary.eos:
                text += self._end_text()
                self.is_ended = True
            else:
                text += self._stops.feed(self._text.feed(token_id))
                self.is_ended = self._stops.found is not None
        events += _deltas(text)
        if self._place.is_inside and self._grid is not None and self._codes:
            events.append(ImageCodes(self._images, self._image[: self._codes], self._grid))
        return events

    def finish(self) -> list[AnswerEvent]:
        """The answer has no more tokens: what was held back, or the image that did not get whole.

        If a stop string appears only here, ``stopped_by`` says so.
        """
        if self._place.is_inside:
            self._place = OUTSIDE
            return [ImageIncomplete(self._images, self._image[: self._codes])]
        return _deltas(self._end_text())

    def _end_text(self) -> str:
        """The rest of a text. The next text is decoded on its own."""
        text = self._stops.feed(self._text.finish()) + self._stops.finish()
        self._text = IncrementalDecoder(self._tokenizer.text)
        return text

    def _begin_image(self) -> ImageStarted:
        self._place = self._form.begun
        self._know(self._form.grid_at(self._place, self._tokenizer.vocabulary.begin_image))
        return ImageStarted(self._images)

    def _know(self, grid: Grid | None) -> None:
        self._grid, self._codes = grid, 0
        self._image = np.empty(grid.codes if grid else 0, np.int64)

    def _grow(self, token_id: int) -> list[AnswerEvent]:
        """Take the next token of an image; it is whole before its end comes."""
        place = self._place
        self._place = self._form.after(place, token_id)
        if place.certain_codes:
            code = self._tokenizer.vocabulary.token_ids_to_codes(np.array([token_id]))
            self._image[self._codes] = code[0]
            self._codes += 1
        elif not self._form.allows(place, token_id):
            lacks = self._form.lacks(place)
            what = f"the token id {token_id:,} cannot come in an image that lacks {lacks}"
            raise DataError("answer", what, "Pass tokens that the engine's rules allow")
        elif (grid := self._form.grid_at(self._place, token_id)) is not None:
            self._know(grid)
        if self._place.left or self._grid is None:
            return []
        done = ImageDone(self._images, self._image, self._grid)
        self._place = OUTSIDE
        self._images += 1
        return [done]


def _deltas(text: str) -> list[AnswerEvent]:
    return [TextDelta(text)] if text else []
