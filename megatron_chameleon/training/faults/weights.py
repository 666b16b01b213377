"""Name the weights that are not finite, for an error that ends a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel.collectives import all_gather

Weights = Iterable[tuple[str, Tensor]]


def check_loaded_weights(weights: Weights, checkpoint: Path) -> None:
    """Refuse a checkpoint that holds a weight that is not finite. A collective.

    Args:
        weights: Those that this rank has loaded, under their names in the whole model.
        checkpoint: Where they are from.

    Raises:
        CheckpointError: On every rank; it names the weights and the ranks.
    """
    names = name_broken_weights(weights)
    if names:
        raise CheckpointError(str(checkpoint), f"not finite: {names}", "Use an older checkpoint")


def name_broken_weights(weights: Weights) -> str:
    """The weights that hold a NaN or an infinity; empty if all are finite.

    A collective: every rank calls it and gets the same text.

    Args:
        weights: This rank's, under their names in the whole model.
    """
    found = [name for name, weight in weights if not torch.isfinite(weight).all().item()]
    return summarize_names(all_gather(found))


def summarize_names(everywhere: Sequence[Sequence[str]]) -> str:
    """The first name of each rank, four at most, and how many more there are.

    Args:
        everywhere: Names by rank.
    """
    firsts = [f"{names[0]} on rank {rank}" for rank, names in enumerate(everywhere) if names]
    count = sum(len(names) for names in everywhere)
    shown = firsts[:4]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"{', '.join(shown)}{more}"
