"""Entropies in nats."""

from torch import Tensor, special


def entropy_of(probabilities_K: Tensor) -> Tensor:
    """The entropy of a distribution: a scalar."""
    return special.entr(probabilities_K.clamp_min(1e-12)).sum()
