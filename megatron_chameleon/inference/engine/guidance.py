"""Classifier-free guidance: the passes of a batch, and how their logits are combined.

All passes are rows of one batch, so that a step reads the weights once. Source: the
reference's ``InBatchInstructCFGLogitsProcessor`` and its split of the prompts; Brooks et al. 2022
(arXiv 2211.09800), equation 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.modality import ModalityState, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions


class Conditioning(StrEnum):
    """What the rows of a pass are conditioned on."""

    ALL = "all"
    """Prompt and answer."""
    IMAGES = "images"
    """``<s>`` and the images of prompt and answer."""
    NOTHING = "nothing"
    """``<s>`` and the image that is being drawn."""


@dataclass(frozen=True)
class Guidance:
    """The passes of a batch. The first one sees everything, and its rows are the answers.

    Args:
        passes: What the rows of each pass are conditioned on.
        scale: The scale of the prompt, or of its text if ``scale_image`` differs.
        scale_image: The scale of the prompt's images.
    """

    passes: tuple[Conditioning, ...]
    scale: float
    scale_image: float

    @classmethod
    def of(cls, options: GenerationOptions) -> "Guidance":
        """Guidance with only the passes that the options need."""
        scale, image = options.guidance, options.guidance_image
        image = scale if image is None else image
        passes = [Conditioning.ALL]
        if image != scale:
            passes.append(Conditioning.IMAGES)
        if image != 1:
            passes.append(Conditioning.NOTHING)
        return cls(tuple(passes), scale, image)

    def prompt(self, kind: Conditioning, prompt: Sequence[int], classes: TokenClasses) -> list[int]:
        """The part of a prompt that the rows of a pass see; prompts start with ``<s>``."""
        if kind is Conditioning.ALL:
            return list(prompt)
        if kind is Conditioning.NOTHING:
            return [classes.bos]
        return [classes.bos, *(t for t in prompt[1:] if t in classes.image_token_ids)]

    def mix(self, logits_RV: Tensor) -> Tensor:
        """Combine the logits of image codes: [passes * B, V] to [B, V]."""
        if len(self.passes) == 1:
            return logits_RV
        full_BV, *others = logits_RV.chunk(len(self.passes))
        base_BV = others[-1]
        if len(self.passes) == 2:
            return base_BV + self.scale * (full_BV - base_BV)
        images_BV = others[0]
        return (
            base_BV + self.scale_image * (images_BV - base_BV) + self.scale * (full_BV - images_BV)
        )

    def visible(self, active_B: Tensor, token_ids_B: Tensor, state: ModalityState) -> Tensor:
        """Which rows see the tokens that were just drawn: bool [passes * B].

        Args:
            active_B: The rows that were not finished before.
            token_ids_B: The tokens that were drawn.
            state: The state after these tokens.
        """
        seen = {Conditioning.ALL: lambda: active_B}
        seen[Conditioning.IMAGES] = lambda: active_B & state.classes.image_V[token_ids_B]
        seen[Conditioning.NOTHING] = lambda: active_B & state.in_image_B
        if len(self.passes) == 1:
            return active_B
        return torch.cat([seen[kind]() for kind in self.passes])

    def forgetful(self, batch: int, device: torch.device) -> Tensor | None:
        """Rows that forget an image when it is complete: bool [passes * B]; None if none does."""
        if Conditioning.NOTHING not in self.passes:
            return None
        forgets = [kind is Conditioning.NOTHING for kind in self.passes]
        return torch.tensor(forgets, device=device).repeat_interleave(batch)
