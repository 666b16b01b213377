"""Name the weights that are not finite, when a run cannot go on because of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel.collectives import all_gather

Weights = Iterable[tuple[str, Tensor]]


def check_loaded_weights(weights: Weights, checkpoint: Path) -> None:
    """Refuse a checkpoint with a weight that is not finite. A collective.

    Raises:
        CheckpointError: On every rank, with the weights and ranks.
    """
    words = name_broken_weights(weights)
    if words:
        raise CheckpointError(str(checkpoint), f"not finite: {words}", "Use an older checkpoint")


def name_broken_weights(weights: Weights) -> str:
    """The weights with a NaN or an infinity; empty where all are finite.

    A collective: every rank calls it and gets the same words.

    Args:
        weights: This rank's, with their names in the whole model.
    """
    found = [name for name, weight in weights if not torch.isfinite(weight).all().item()]
    return describe_names(all_gather(found))


def describe_names(everywhere: Sequence[Sequence[str]]) -> str:
    """The first of each rank, four at most, and how many there are."""
    firsts = [f"{names[0]} on rank {rank}" for rank, names in enumerate(everywhere) if names]
    count = sum(len(names) for names in everywhere)
    shown = firsts[:4]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"{', '.join(shown)}{more}"
