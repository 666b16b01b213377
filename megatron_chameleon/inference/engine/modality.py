"""Which tokens may come next: a state machine for the rows of a batch, each in its own modality.

    text --begin image--> image --codes_per_image codes--> end image --> text --</s>--> finished

In text, any text token may come, ``</s>``, and begin-image if there is room for a whole image. In
an image, only codes may come until it is full, and then only its end. Nothing else is ever allowed:
no code in text, and no ``<pad>``, ``<s>``, ``<unk>``, separator or placeholder. Source: paper,
section 2.4; the reference inference code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Self

import torch
from torch import Tensor

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
        self.text_V = ~self.code_V
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
        """Codes, and the beginning and end of an image."""
        self.image_V[[self.begin_image, self.end_image]] = True
        self.image_token_ids = frozenset(self.image_V.nonzero()[:, 0].tolist())
        self.allowed_KV = self._allowed()
        """bool [K, vocabulary], with a row for each ``NextToken``."""
        self.limits_KV = torch.full(self.allowed_KV.shape, -torch.inf, device=device)
        """fp32 [K, vocabulary], the largest logit that a token may have: -inf where it may not come
        next, and the largest number elsewhere."""
        self.limits_KV[self.allowed_KV] = torch.finfo(torch.float32).max

    def _allowed(self) -> Tensor:
        allowed_KV = torch.zeros(
            (len(NextToken), len(self.text_V)), dtype=torch.bool, device=self.text_V.device
        )
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
    """

    in_text: NextToken
    image_room: int
    only_image: bool

    @classmethod
    def of(cls, codes_per_image: int, images: bool = True, force: Force | None = None) -> Self:
        """The rules of the options ``images`` and ``force``."""
        if force is Force.IMAGE:
            return cls(NextToken.BEGIN_IMAGE, NEVER_TOKENS, True)
        may_begin = codes_per_image > 0 and may_draw(images, force)
        room = codes_per_image + 2 if may_begin else NEVER_TOKENS  # begin, codes, end
        return cls(NextToken.TEXT, room, False)


@dataclass(frozen=True)
class ModalityState:
    """The state of every row. Its tensors keep their addresses, because a CUDA graph may hold them.

    Args:
        classes: The vocabulary's token classes.
        codes_per_image: Number of codes of one image.
        tokens_left_B: int64 [batch], how many tokens each row may still get.
        codes_left_B: int64 [batch], codes still missing in the current image; -1 outside an image.
        finished_B: bool [batch].
        in_text_B, image_room_B, only_image_B: int64, int64 and bool [batch], ``AnswerRules``.
    """

    classes: TokenClasses
    codes_per_image: int
    tokens_left_B: Tensor
    codes_left_B: Tensor
    finished_B: Tensor
    in_text_B: Tensor
    image_room_B: Tensor
    only_image_B: Tensor

    @classmethod
    def begin(
        cls,
        classes: TokenClasses,
        codes_per_image: int,
        tokens_left: Sequence[int],
        rules: Sequence[AnswerRules],
    ) -> Self:
        """The state of answers without a token. One with no token left is finished."""
        left_B, in_text_B, room_B = torch.tensor(
            [
                tokens_left,
                [int(rule.in_text) for rule in rules],
                [rule.image_room for rule in rules],
            ]
        )
        only_image_B = torch.tensor([rule.only_image for rule in rules])
        outside_B = torch.full_like(left_B, -1)
        return cls(
            classes,
            codes_per_image,
            *(left_B, outside_B, left_B <= 0, in_text_B, room_B, only_image_B),
        )

    @property
    def in_image_B(self) -> Tensor:
        """bool [batch]: the next token is a code or the end of an image."""
        return self.codes_left_B >= 0

    def next_token(self) -> Tensor:
        """``NextToken`` of each row: int64 [batch]."""
        # TEXT_OR_IMAGE is TEXT + 1
        next_B = self.in_text_B + (self.tokens_left_B >= self.image_room_B)
        next_B.masked_fill_(self.codes_left_B > 0, NextToken.CODE)
        next_B.masked_fill_(self.codes_left_B == 0, NextToken.END_IMAGE)
        return next_B.masked_fill_(self.finished_B, NextToken.FINISHED)

    def allowed(self) -> Tensor:
        """bool [batch, vocabulary]: what may come next; only ``<pad>`` in finished rows."""
        return self.classes.allowed_KV.index_select(0, self.next_token())

    def advance(self, token_ids_B: Tensor) -> None:
        """Update the state with the chosen tokens, int64 [batch]; finished rows do not change."""
        active_B = ~self.finished_B
        begins_B = active_B & (token_ids_B == self.classes.begin_image)
        # at 0 the end of the image comes, which makes it -1
        self.codes_left_B.sub_((active_B & self.in_image_B).long())
        self.codes_left_B.masked_fill_(begins_B, self.codes_per_image)
        self.tokens_left_B.sub_(active_B.long())
        self.finished_B.logical_or_(token_ids_B == self.classes.eos)
        self.finished_B.logical_or_(self.tokens_left_B <= 0)
        self.finished_B.logical_or_(self.only_image_B & (token_ids_B == self.classes.end_image))

    def advance_codes(self) -> None:
        """Update the state with a code in every row. Each must be in an image that is not full."""
        self.codes_left_B.sub_(1)
        self.tokens_left_B.sub_(1)
