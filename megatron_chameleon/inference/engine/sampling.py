"""Draw one token id per row, with fixed shapes and without waiting for the device.

Letters in tensor names: B rows of the batch, V vocabulary (within an image, only its codes).
"""

import torch
from torch import Tensor

from megatron_chameleon.inference.engine.options import GenerationOptions


def choose(
    logits_BV: Tensor, allowed_BV: Tensor, options: GenerationOptions, generator: torch.Generator
) -> Tensor:
    """Draw one token id for each row.

    Args:
        logits_BV: fp32 [B, V].
        allowed_BV: bool [B, V], with at least one True per row.
        options: Temperature, top_k and top_p, applied in this order.
        generator: The source of randomness, unused at temperature 0.

    Returns:
        int64 [B].
    """
    masked_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
    return draw(masked_BV, options, generator, logits_BV.shape[1])


def draw(
    logits_BV: Tensor, options: GenerationOptions, generator: torch.Generator, numbers: int
) -> Tensor:
    """Draw the index of one logit per row, by temperature, top_k and top_p.

    Args:
        logits_BV: fp32 [B, V]; -inf is never drawn.
        options: As for ``choose``.
        generator: As for ``choose``.
        numbers: How many random numbers to take for each row, at least V. A draw among codes only
            takes as many as one over the vocabulary, so that both give the same tokens.

    Returns:
        int64 [B].
    """
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1)
    ordered_BV, ids_BV = logits_BV.div(options.temperature).sort(dim=-1, descending=True)
    if options.top_k:
        ordered_BV[:, options.top_k :] = -torch.inf
    probabilities_BV = ordered_BV.softmax(dim=-1)
    if options.top_p < 1:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= options.top_p, 0.0)
    # as torch.multinomial does it, but without its checks, which wait for the device
    rows, width = logits_BV.shape
    waits_BV = logits_BV.new_empty((rows, numbers)).exponential_(generator=generator)[:, :width]
    place_B1 = (probabilities_BV / waits_BV).argmax(dim=-1, keepdim=True)
    return ids_BV.gather(1, place_B1)[:, 0]


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely that a row already has. Source: CTRL, section 4.1."""
    if penalty == 1:
        return logits_BV
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)
