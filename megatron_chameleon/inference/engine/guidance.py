"""Classifier-free guidance: the passes of an answer, and how their logits are combined.

Each pass is a row of the batch, so that a step reads the weights once. Source: the reference's
``InBatchInstructCFGLogitsProcessor`` and its split of the prompts; Brooks et al. 2022 (arXiv
2211.09800), equation 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.modality import TokenClasses, may_draw
from megatron_chameleon.inference.engine.options import GenerationOptions


class Conditioning(IntEnum):
    """What a row is conditioned on."""

    ALL = 0
    """Prompt and answer."""
    IMAGES = 1
    """``<s>`` and the images of prompt and answer."""
    NOTHING = 2
    """``<s>`` and the image that is being drawn."""


@dataclass(frozen=True)
class Guidance:
    """The passes of an answer. The first one sees everything.

    Args:
        passes: What the row of each pass is conditioned on.
        scale: The scale of the prompt, or of its text if ``scale_image`` differs.
        scale_image: The scale of the prompt's images.
    """

    passes: tuple[Conditioning, ...]
    scale: float
    scale_image: float

    @classmethod
    def of(cls, options: GenerationOptions) -> "Guidance":
        """Guidance with only the passes that the options need: one for an answer in text alone."""
        scale, image = options.guidance, options.guidance_image
        image = scale if image is None else image
        passes = [Conditioning.ALL]
        draws = may_draw(options.images, options.force)
        if draws and image != scale:
            passes.append(Conditioning.IMAGES)
        if draws and image != 1:
            passes.append(Conditioning.NOTHING)
        return cls(tuple(passes), scale, image)

    @property
    def mixed_passes(self) -> tuple[int, int, int]:
        """The places in ``passes`` of the three logits that ``mix`` combines.

        A pass that is not needed is replaced by one that makes its term 0.
        """
        last = len(self.passes) - 1
        images = 1 if Conditioning.IMAGES in self.passes else last
        return 0, images, last

    def prompt(self, kind: Conditioning, prompt: Sequence[int], classes: TokenClasses) -> list[int]:
        """The part of a prompt that the row of a pass sees; prompts start with ``<s>``."""
        if kind is Conditioning.ALL:
            return list(prompt)
        if kind is Conditioning.NOTHING:
            return [classes.bos]
        return [classes.bos, *(t for t in prompt[1:] if t in classes.image_token_ids)]

    def mix(self, logits_PV: Tensor) -> Tensor:
        """Combine the logits of the passes of one answer: [passes, V] to [1, V]."""
        full_1V, images_1V, nothing_1V = (logits_PV[place, None] for place in self.mixed_passes)
        return combined(full_1V, images_1V, nothing_1V, self.scale, self.scale_image)


def mix(logits_RV: Tensor, row_3B: Tensor, scale_B: Tensor, scale_image_B: Tensor) -> Tensor:
    """Combine the logits of the passes of each answer: [R, V] to [B, V].

    Args:
        logits_RV: Of all rows.
        row_3B: int64 [3, B], the rows with everything, images alone and nothing of the prompt.
        scale_B, scale_image_B: fp32 [B], as in ``Guidance``.
    """
    full_BV, images_BV, nothing_BV = (logits_RV.index_select(0, row_B) for row_B in row_3B)
    return combined(full_BV, images_BV, nothing_BV, scale_B[:, None], scale_image_B[:, None])


def combined(
    full_BV: Tensor,
    images_BV: Tensor,
    nothing_BV: Tensor,
    scale_B1: Tensor | float,
    scale_image_B1: Tensor | float,
) -> Tensor:
    """The formula of guidance, of an image scale and a text scale."""
    return nothing_BV + scale_image_B1 * (images_BV - nothing_BV) + scale_B1 * (full_BV - images_BV)


def visible(kind_R: Tensor, token_ids_R: Tensor, in_image_R: Tensor, image_V: Tensor) -> Tensor:
    """Which rows see the tokens that were just drawn for their answers: bool [R].

    Args:
        kind_R: int64 [R], ``Conditioning``.
        token_ids_R: int64 [R], the tokens.
        in_image_R: bool [R], whether the answers are in an image after these tokens.
        image_V: bool [V], ``TokenClasses.image_V``.
    """
    return torch.where(
        kind_R == Conditioning.NOTHING,
        in_image_R,
        (kind_R == Conditioning.ALL) | image_V.index_select(0, token_ids_R),
    )
