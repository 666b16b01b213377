"""The names under which a training checkpoint stores the optimizer's state."""

from collections.abc import Iterable

import torch

OPTIMIZER_PREFIX = "optimizer."
MAIN_WEIGHT = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"
"""Muon's, in place of AdamW's moments."""
AVERAGE = "ema"
"""The moving average of a weight, which belongs to the optimizer's state like a moment."""


def optimizer_key(part: str, name: str) -> str:
    """The name under which a checkpoint stores a part of a weight's optimizer state.

    Args:
        part: ``MAIN_WEIGHT``, one of ``MOMENTS``, ``MOMENTUM`` or ``AVERAGE``.
        name: The weight's name.
    """
    return f"{OPTIMIZER_PREFIX}state.{part}.{name}"


def has_average(stored: Iterable[str]) -> bool:
    """Whether a checkpoint with these names has a moving average of the weights."""
    return any(name.startswith(optimizer_key(AVERAGE, "")) for name in stored)


def optimizer_parts(dtype: torch.dtype, moments: Iterable[str] = MOMENTS) -> tuple[str, ...]:
    """The parts of optimizer state for a weight of this dtype.

    An fp32 weight is its own main weight, so only the others remain.

    Args:
        dtype: The weight's.
        moments: The parts besides the main weight.
    """
    main = () if dtype == torch.float32 else (MAIN_WEIGHT,)
    return (*main, *moments)
