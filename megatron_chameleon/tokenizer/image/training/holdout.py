"""Which pictures are not trained on, so that a tokenizer can be measured on them."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from megatron_chameleon.tokenizer.image.training.batches import TrainingImage

Entry = TypeVar("Entry", bound=TrainingImage)


def hold_out(entries: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Divide pictures into those to train on and those to measure.

    It depends on the name of a picture alone, so a larger set keeps the division of a smaller one.

    Args:
        entries: All of them.
        share: Of those to measure, in [0, 1).

    Returns:
        Both in the order of ``entries``. The first one is not empty.
    """
    if share <= 0:
        return list(entries), []
    is_held_out = [_place(entry.where) < share for entry in entries]
    kept = [entry for entry, held in zip(entries, is_held_out, strict=True) if not held]
    if sum(entry.weight for entry in kept) <= 0:
        return list(entries), []
    return kept, [entry for entry, held in zip(entries, is_held_out, strict=True) if held]


def _place(name: str) -> float:
    """A place in [0, 1) that depends on a name alone."""
    digest = hashlib.sha256(f"held out\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
