"""What may come next: a state machine over the rows of a batch, each in a modality of its own.

    text --begin image--> image --codes_per_image codes--> end image --> text --</s>--> finished

In text any text token may come, ``</s>``, and begin-image where there is room for a whole image. In
an image only codes may come until it is full, then only its end. Nothing else is ever allowed: no
code in text, no ``<pad>``, ``<s>``, ``<unk>``, separator or placeholder. Source: paper, section
2.4; the reference inference code.
"""

from enum import StrEnum

import torch
from torch import Tensor

from megatron_chameleon.tokenizer.vocabulary import Vocabulary


class Force(StrEnum):
    """A modality that the whole answer must have."""

    TEXT = "text"
    """Text until ``</s>``, no image."""
    IMAGE = "image"
    """One image, nothing before or after it."""


class TokenClasses:
    """Which token ids belong to which class, as masks over the vocabulary.

    Args:
        vocabulary: The model's.
        device: Where the masks are needed.
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


class ModalityState:
    """The state of every row.

    Args:
        classes: The vocabulary's token classes.
        codes_per_image: Codes of one image.
        room_B: int64 [batch], tokens that each row may still get; reaching 0 finishes the row.
        images: Whether a row may begin an image by itself.
        force: A modality for the whole answer, or None.

    Attributes:
        codes_left_B: int64 [batch], codes that the current image still lacks; -1 outside an image.
        finished_B: bool [batch].
    """

    def __init__(
        self,
        classes: TokenClasses,
        codes_per_image: int,
        room_B: Tensor,
        *,
        images: bool = True,
        force: Force | None = None,
    ) -> None:
        self.classes = classes
        self.codes_per_image = codes_per_image
        self.room_B = room_B.clone()
        self.codes_left_B = torch.full_like(room_B, -1)
        self.finished_B = room_B <= 0
        self._images = images and codes_per_image > 0 and force is not Force.TEXT
        self._only_image = force is Force.IMAGE

    @property
    def in_image_B(self) -> Tensor:
        """bool [batch]: the next token is a code or the end of an image."""
        return self.codes_left_B >= 0

    def allowed(self) -> Tensor:
        """bool [batch, vocabulary]: what may come next; ``<pad>`` alone in finished rows."""
        classes = self.classes
        in_image_B1 = self.in_image_B[:, None]
        full_B1 = self.codes_left_B[:, None] == 0
        allowed_BV = torch.where(in_image_B1 & ~full_B1, classes.code_V, classes.text_V)
        allowed_BV = allowed_BV & ~(full_B1 | self._must_begin()[:, None])
        allowed_BV[:, classes.end_image] = full_B1[:, 0]
        allowed_BV[:, classes.begin_image] = self._may_begin()
        allowed_BV[:, classes.eos] = ~self.in_image_B & ~self._must_begin()
        allowed_BV[self.finished_B] = False
        allowed_BV[self.finished_B, classes.pad] = True
        return allowed_BV

    def advance(self, token_ids_B: Tensor) -> None:
        """Take the chosen tokens: int64 [batch], each allowed; finished rows stay as they are."""
        active_B = ~self.finished_B
        begins_B = active_B & (token_ids_B == self.classes.begin_image)
        ends_B = active_B & (token_ids_B == self.classes.end_image)
        self.codes_left_B -= (active_B & self.in_image_B & ~ends_B).to(self.codes_left_B.dtype)
        self.codes_left_B[begins_B] = self.codes_per_image
        self.codes_left_B[ends_B] = -1
        self.room_B -= active_B.to(self.room_B.dtype)
        self.finished_B |= (token_ids_B == self.classes.eos) | (self.room_B <= 0)
        if self._only_image:
            self.finished_B |= ends_B

    def _must_begin(self) -> Tensor:
        """bool [batch]: an answer that is one image begins with its begin."""
        return ~self.in_image_B & self._only_image

    def _may_begin(self) -> Tensor:
        has_room_B = self.room_B >= self.codes_per_image + 2  # begin, codes, end
        return ~self.in_image_B & has_room_B & self._images
