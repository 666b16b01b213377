"""The form of an image in a sequence of tokens: what follows what, from its beginning to its end.

A vocabulary without grids has images of one size:

    begin-image, the codes of a square, end-image

With grids, an image says its rows and columns first, and each row has an end:

    begin-image, grid, codes of a row, end-row, ..., codes of the last row, end-row, end-image

Everything that reads or writes an image token by token asks an ``ImageForm``: the engine's rules,
the streams of answers, and the checks of prompts. The functions of ``Vocabulary`` convert whole
images.
"""

import re
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.common.grids import Grid, square_grid
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.wording import counted, shown

GRID_DUE = 1 << 60
"""``ImagePlace.left`` of an image that has not said its grid yet."""
_SIZE = re.compile(
    r"(\d{1,6}(?:\.\d{1,6})?)\s*[:x×]\s*(\d{1,6}(?:\.\d{1,6})?)", re.IGNORECASE | re.ASCII
)


class ImagePlace(NamedTuple):
    """Where in an image a sequence of tokens ends."""

    left: int
    """Codes and ends of rows that are still missing; ``GRID_DUE`` before the grid; 0 if only the
    end of the image is missing; -1 outside an image."""
    row_tokens: int = 1
    """Codes of a row and its end; 1 for an image whose rows have no ends."""

    @property
    def is_inside(self) -> bool:
        """Whether the image has begun and not ended."""
        return self.left >= 0

    @property
    def certain_codes(self) -> int:
        """How many of the next tokens can only be codes."""
        if self.left <= 0 or self.left == GRID_DUE:
            return 0
        return self.left if self.row_tokens == 1 else (self.left - 1) % self.row_tokens


OUTSIDE = ImagePlace(-1)


def aspect_ratio(size: str) -> Fraction:
    """The width of an image over its height, from words such as ``3:2`` or ``480x320``.

    Raises:
        ConfigError: They are no size.
    """
    match = _SIZE.fullmatch(size.strip())
    width, height = (Fraction(side) for side in match.groups()) if match else (0, 0)
    if not (width and height):
        raise ConfigError(
            "size",
            f"{shown(size)} is not the size of an image",
            "Give width and height, as in 3:2 or 480x320",
        )
    return Fraction(width, height)


class ImageForm:
    """The form of the images that a model draws.

    Args:
        vocabulary: Of the model.
        codes: Codes of a square image; 0 if the model draws no images.

    Attributes:
        grids: The grids that an image may have, if it says its own; empty if all are squares of
            ``codes``.
        draws: Whether there are images at all.
        begun: The place behind the beginning of an image.
    """

    def __init__(self, vocabulary: Vocabulary, codes: int) -> None:
        self.vocabulary, self.codes = vocabulary, codes
        self.grids = vocabulary.grids
        self.draws = codes > 0
        self.begun = ImagePlace(GRID_DUE if self.grids else codes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The different numbers of tokens of an image with beginning and end, ascending."""
        if not self.grids:
            return (self.codes + 2,)
        return tuple(sorted({self.vocabulary.image_length(grid) for grid in self.grids}))

    @property
    def longest(self) -> int:
        """The most tokens of an image, with its beginning and end."""
        return self.lengths[-1]

    def tokens_needed(self, size: str | None = None) -> int:
        """How many tokens must be left for an image to be begun.

        Args:
            size: That is asked for; None: any.

        Raises:
            ChameleonError: As ``grid_of_size``.
        """
        grid = self.grid_of_size(size)
        return self.lengths[0] if grid is None else self.vocabulary.image_length(grid)

    def grid_of_size(self, size: str | None) -> Grid | None:
        """The grid whose shape is nearest to a size; None if the model chooses, or cannot.

        Raises:
            ConfigError: ``size`` is malformed.
            DataError: The model draws nothing, or only squares and this is none.
        """
        if size is None:
            return None
        ratio = aspect_ratio(size)
        if not self.draws:
            raise DataError("size", "the model draws no images", "Leave it out")
        shapes = self.vocabulary.shapes
        if shapes is not None:
            return shapes.grid_of(ratio.numerator, ratio.denominator)
        if ratio != 1:
            raise DataError(
                "size",
                f"{shown(size)} is not square, but all images of this model are: its tokenizer has "
                "no grids of other shapes",
                "Leave it out, or use a model whose tokenizer was made with --image-grids",
            )
        return None

    def after(self, place: ImagePlace, token_id: int) -> ImagePlace:
        """The place after a token that is allowed at ``place``."""
        left = place.left
        if 0 < left < GRID_DUE:
            return ImagePlace(left - 1, place.row_tokens)
        if token_id == self.vocabulary.begin_image:
            return self.begun
        if left == GRID_DUE and (grid := self.vocabulary.grid_of_token(token_id)) is not None:
            return ImagePlace(self.body(grid), grid.columns + 1)
        return OUTSIDE

    @staticmethod
    def body(grid: Grid) -> int:
        """The number of codes and ends of rows of an image with this grid."""
        return grid.rows * (grid.columns + 1)

    def grid_at(self, place: ImagePlace, token_id: int) -> Grid | None:
        """The grid that becomes known when a token leads to ``place``; None if it is still unknown,
        or was known before.

        Raises:
            DataError: The codes of a square image fill no square.
        """
        if not self.grids:
            return square_grid(self.codes) if place == self.begun else None
        return self.vocabulary.grid_of_token(token_id)

    def allows(self, place: ImagePlace, token_id: int) -> bool:
        """Whether a token may come next. Outside an image: whether it may stand outside images."""
        if place.left == GRID_DUE:
            return self.vocabulary.grid_of_token(token_id) is not None
        if place.left == 0:
            return token_id == self.vocabulary.end_image
        if place.left < 0:
            return token_id not in self._inner
        if place.certain_codes:
            return token_id in self._codes
        return token_id == self.vocabulary.end_row

    def lacks(self, place: ImagePlace) -> str:
        """What an image lacks, in words."""
        if place.left == GRID_DUE:
            return "its grid"
        if place.left == 0:
            return "its end"
        if place.row_tokens == 1:
            return counted(place.left, "code")
        rows, rest = divmod(place.left, place.row_tokens)
        codes = rows * (place.row_tokens - 1) + max(rest - 1, 0)
        return counted(codes, "code") if codes else "the end of its last row"

    @cached_property
    def _codes(self) -> frozenset[int]:
        return frozenset(self.vocabulary.code_token_ids.tolist())

    @cached_property
    def _inner(self) -> frozenset[int]:
        """Tokens that occur only inside an image, after its beginning."""
        beside = self.vocabulary.tokens_beside_codes.tolist()
        return self._codes.union(beside, [self.vocabulary.end_image])
