"""Which tokens may come next: a state machine for the rows of a batch, each in its own modality.

    text --begin image--> image --all of its codes--> end image --> text --</s>--> finished

In text, any text token may come, ``</s>``, and begin-image if there is room for a whole image. In
an image, only codes may come until it is full, and then only its end. Nothing else is ever allowed:
no code in text, and no ``<pad>``, ``<s>``, ``<unk>``, separator or placeholder. Source: paper,
section 2.4; the reference inference code.

In a vocabulary with grids (``tokenizer/common/image_form.py``), an image begins with its grid, of
which only those are offered that still fit, and then has exactly so many rows of exactly so many
codes, each with its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Self

import torch
from torch import Tensor

from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.image_form import GRID_DUE, OUTSIDE, ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary


class Force(StrEnum):
    """A modality that the whole answer must have."""

    TEXT = "text"
    """Text until ``</s>``, and no image."""
    IMAGE = "image"
    """One image, with nothing before or after it."""


class NextToken(IntEnum):
    """The tokens that may come next in a row."""

    TEXT = 0
    """Text or ``</s>``."""
    TEXT_OR_IMAGE = 1
    """Text, ``</s>`` or the beginning of an image."""
    CODE = 2
    END_IMAGE = 3
    BEGIN_IMAGE = 4
    FINISHED = 5
    """``<pad>``, which no one sees."""
    END_ROW = 6
    """This kind and those after it are only there in a vocabulary with grids."""
    GRID = 7
    """A grid of an image of the smallest length. There is a kind for each length, with the grids of
    images that are no longer, and behind them one for each grid alone."""


class TokenClasses:
    """Which token ids belong to which class, as masks over the vocabulary.

    Args:
        vocabulary: The model's vocabulary.
        device: The device of the masks.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        self.begin_image, self.end_image = vocabulary.begin_image, vocabulary.end_image
        self.eos, self.pad, self.bos = vocabulary.eos, vocabulary.pad, vocabulary.bos
        self.code_V = torch.zeros(vocabulary.size, dtype=torch.bool, device=device)
        self.code_V[torch.as_tensor(vocabulary.code_token_ids.copy())] = True
        self.form = ImageForm(vocabulary, 0)
        """Only its grids matter here."""
        self.text_V = ~self.code_V
        self.text_V[torch.as_tensor(vocabulary.tokens_beside_codes)] = False
        for token_id in (
            vocabulary.bos,
            vocabulary.pad,
            vocabulary.eos,
            vocabulary.unk,
            vocabulary.begin_image,
            vocabulary.end_image,
            vocabulary.separator,
            vocabulary.image_placeholder,
        ):
            self.text_V[token_id] = False
        self.code_token_ids = self.code_V.nonzero()[:, 0]
        """int64 [codes], ascending."""
        self.image_V = self.code_V.clone()
        """All tokens of images: codes, beginnings and ends, grids and ends of rows."""
        self.image_V[[self.begin_image, self.end_image]] = True
        self.image_V[torch.as_tensor(vocabulary.tokens_beside_codes)] = True
        self.image_token_ids = frozenset(self.image_V.nonzero()[:, 0].tolist())
        self.allowed_KV = self._allowed()
        """bool [K, vocabulary], with a row for each ``NextToken``."""
        self.limits_KV = torch.full(self.allowed_KV.shape, -torch.inf, device=device)
        """fp32 [K, vocabulary], the largest logit that a token may have: -inf where it may not come
        next, and the largest number elsewhere."""
        self.limits_KV[self.allowed_KV] = torch.finfo(torch.float32).max
        self.body_V, self.row_tokens_V, self.rooms_N = self._grids(device)
        """int64 [vocabulary], the codes and ends of rows that follow a grid, 0 for other tokens;
        the same of one row; and int64 [lengths], how many tokens must be left for the grids of
        each of ``NextToken.GRID``'s kinds."""

    def _grids(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        body_V, row_tokens_V = torch.zeros((2, len(self.text_V)), dtype=torch.int64)
        for token_id, grid in zip(self._grid_token_ids, self.form.grids, strict=True):
            body_V[token_id], row_tokens_V[token_id] = self.form.body(grid), grid.columns + 1
        rooms_N = torch.tensor(self.form.lengths) - 1  # the beginning has been drawn
        return body_V.to(device), row_tokens_V.to(device), rooms_N.to(device)

    @property
    def _grid_token_ids(self) -> list[int]:
        return self.form.vocabulary.grid_token_ids.tolist()

    def _allowed(self) -> Tensor:
        form = self.form
        kinds = len(form.lengths) + len(form.grids) if form.grids else -1  # no ends of rows either
        allowed_KV = torch.zeros(
            (NextToken.GRID + kinds, len(self.text_V)), dtype=torch.bool, device=self.text_V.device
        )
        if form.grids:
            allowed_KV[NextToken.END_ROW, form.vocabulary.end_row] = True
        for token_id, grid in zip(self._grid_token_ids, form.grids, strict=True):
            length = form.lengths.index(form.vocabulary.image_length(grid))
            allowed_KV[NextToken.GRID + length : NextToken.GRID + len(form.lengths), token_id] = (
                True
            )
            allowed_KV[kind_of_grid(form, grid), token_id] = True
        allowed_KV[NextToken.TEXT] = self.text_V
        allowed_KV[NextToken.TEXT_OR_IMAGE] = self.text_V
        allowed_KV[NextToken.CODE] = self.code_V
        for situation, token_id in (
            (NextToken.TEXT, self.eos),
            (NextToken.TEXT_OR_IMAGE, self.eos),
            (NextToken.TEXT_OR_IMAGE, self.begin_image),
            (NextToken.END_IMAGE, self.end_image),
            (NextToken.BEGIN_IMAGE, self.begin_image),
            (NextToken.FINISHED, self.pad),
        ):
            allowed_KV[situation, token_id] = True
        return allowed_KV


def kind_of_grid(form: ImageForm, grid: Grid) -> int:
    """The kind of next token that is one certain grid."""
    return NextToken.GRID + len(form.lengths) + form.grids.index(grid)


NEVER_TOKENS = 1 << 60
"""More tokens than an answer ever has left: an answer that needs them never begins an image."""


def may_draw(images: bool, force: Force | None) -> bool:
    """Whether an answer with these options may have an image, if the model draws any."""
    return force is Force.IMAGE or (images and force is not Force.TEXT)


@dataclass(frozen=True)
class AnswerRules:
    """What the options of an answer say of its modalities.

    Args:
        in_text: ``NextToken`` outside an image, if no image may be begun.
        image_room: How many tokens must be left for an image to be begun.
        only_image: Whether the answer ends with the end of its image.
        grid_kind: The kind of next token that is the grid of each image; 0 lets the model choose.
    """

    in_text: NextToken
    image_room: int
    only_image: bool
    grid_kind: int = 0

    @classmethod
    def of(
        cls,
        form: ImageForm,
        images: bool = True,
        force: Force | None = None,
        size: str | None = None,
    ) -> Self:
        """The rules of the options ``images``, ``force`` and ``size``.

        Raises:
            ChameleonError: As ``ImageForm.grid_of_size``.
        """
        grid = form.grid_of_size(size)
        kind = 0 if grid is None else kind_of_grid(form, grid)
        if force is Force.IMAGE:
            return cls(NextToken.BEGIN_IMAGE, NEVER_TOKENS, True, kind)
        may_begin = form.draws and may_draw(images, force)
        room = form.tokens_needed(size) if may_begin else NEVER_TOKENS
        return cls(NextToken.TEXT, room, False, kind)


@dataclass(frozen=True)
class ModalityState:
    """The state of every row. Its tensors keep their addresses, because a CUDA graph may hold them.

    Args:
        classes: The vocabulary's token classes.
        form: The form of an image.
        tokens_left_B: int64 [batch], how many tokens each row may still get.
        image_left_B: int64 [batch], ``ImagePlace.left`` of each row.
        finished_B: bool [batch].
        in_text_B, image_room_B, only_image_B: int64, int64 and bool [batch], ``AnswerRules``.
        row_tokens_B: int64 [batch], ``ImagePlace.row_tokens`` of each row.
        grid_kind_B: int64 [batch], ``AnswerRules``.
    """

    classes: TokenClasses
    form: ImageForm
    tokens_left_B: Tensor
    image_left_B: Tensor
    finished_B: Tensor
    in_text_B: Tensor
    image_room_B: Tensor
    only_image_B: Tensor
    row_tokens_B: Tensor
    grid_kind_B: Tensor

    @classmethod
    def begin(
        cls,
        classes: TokenClasses,
        form: ImageForm,
        tokens_left: Sequence[int],
        rules: Sequence[AnswerRules],
    ) -> Self:
        """The state of answers without a token. One with no token left is finished."""
        left_B, in_text_B, room_B, grid_B = torch.tensor(
            [
                tokens_left,
                [int(rule.in_text) for rule in rules],
                [rule.image_room for rule in rules],
                [rule.grid_kind for rule in rules],
            ]
        )
        only_image_B = torch.tensor([rule.only_image for rule in rules])
        outside_B, row_B = (torch.full_like(left_B, value) for value in OUTSIDE)
        return cls(
            classes,
            form,
            *(left_B, outside_B, left_B <= 0, in_text_B, room_B, only_image_B, row_B, grid_B),
        )

    @property
    def in_image_B(self) -> Tensor:
        """bool [batch]: the next token is one of an image that has begun."""
        return self.image_left_B >= 0

    def next_token(self) -> Tensor:
        """``NextToken`` of each row: int64 [batch]."""
        # TEXT_OR_IMAGE is TEXT + 1
        next_B = self.in_text_B + (self.tokens_left_B >= self.image_room_B)
        next_B.masked_fill_(self.image_left_B > 0, NextToken.CODE)
        next_B.masked_fill_(self.image_left_B == 0, NextToken.END_IMAGE)
        if self.form.grids:
            ends_row_B = (self.image_left_B > 0) & (self.image_left_B % self.row_tokens_B == 1)
            next_B.masked_fill_(ends_row_B, NextToken.END_ROW)
            fits_B = torch.bucketize(self.tokens_left_B, self.classes.rooms_N, right=True)
            fits_B = fits_B.clamp_(min=1) + (NextToken.GRID - 1)
            grid_B = torch.where(self.grid_kind_B > 0, self.grid_kind_B, fits_B)
            next_B = torch.where(self.image_left_B == GRID_DUE, grid_B, next_B)
        return next_B.masked_fill_(self.finished_B, NextToken.FINISHED)

    def allowed(self) -> Tensor:
        """bool [batch, vocabulary]: what may come next; only ``<pad>`` in finished rows."""
        return self.classes.allowed_KV.index_select(0, self.next_token())

    def advance(self, token_ids_B: Tensor) -> None:
        """Update the state with the chosen tokens, int64 [batch]; finished rows do not change."""
        active_B = ~self.finished_B
        begins_B = active_B & (token_ids_B == self.classes.begin_image)
        # at 0 the end of the image comes, which makes it -1
        self.image_left_B.sub_((active_B & self.in_image_B).long())
        self.image_left_B.masked_fill_(begins_B, self.form.begun.left)
        if self.form.grids:
            body_B = self.classes.body_V.index_select(0, token_ids_B)
            row_tokens_B = self.classes.row_tokens_V.index_select(0, token_ids_B)
            announced_B = active_B & (body_B > 0)
            self.image_left_B.copy_(torch.where(announced_B, body_B, self.image_left_B))
            self.row_tokens_B.copy_(torch.where(announced_B, row_tokens_B, self.row_tokens_B))
        self.tokens_left_B.sub_(active_B.long())
        self.finished_B.logical_or_(token_ids_B == self.classes.eos)
        self.finished_B.logical_or_(self.tokens_left_B <= 0)
        self.finished_B.logical_or_(self.only_image_B & (token_ids_B == self.classes.end_image))

    def advance_codes(self) -> None:
        """Update the state with a code in every row. Each must be in an image where one is due."""
        self.image_left_B.sub_(1)
        self.tokens_left_B.sub_(1)
