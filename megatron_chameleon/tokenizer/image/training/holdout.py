"""Which pictures are not trained on, so that a tokenizer can be measured on them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from megatron_chameleon.tokenizer.image.training_image import TrainingImage

Entry = TypeVar("Entry", bound=TrainingImage)


def hold_out(entries: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Divide pictures into those to train on and those to measure.

    It depends on the name of a picture without its folder, so a larger set keeps the division of a
    smaller one, and so does a set that is moved. Pictures of the same name are counted.

    Args:
        entries: All of them.
        share: Of those to measure, in [0, 1).

    Returns:
        Both in the order of ``entries``. The first one is not empty.
    """
    if share <= 0:
        return list(entries), []
    seen: Counter[str] = Counter()
    is_held_out = []
    for entry in entries:
        name = entry.where.rpartition("/")[2]
        is_held_out.append(_place(f"{name}\0{seen[name]}") < share)
        seen[name] += 1
    kept = [entry for entry, held in zip(entries, is_held_out, strict=True) if not held]
    if sum(entry.weight for entry in kept) <= 0:
        return list(entries), []
    return kept, [entry for entry, held in zip(entries, is_held_out, strict=True) if held]


def _place(name: str) -> float:
    """A place in [0, 1) that depends on a name alone."""
    digest = hashlib.sha256(f"held out\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
