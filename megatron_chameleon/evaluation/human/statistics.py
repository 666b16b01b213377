"""Votes of annotators: majority, how far they agree, intervals, Krippendorff's alpha.

Source: paper, sections 4.2 to 4.4; Krippendorff, "Content Analysis", for alpha, whose arithmetic is
the package ``krippendorff``'s.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from megatron_chameleon.errors import ConfigError

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")
CONFIDENCE = 0.95


def majority(votes: Sequence[str]) -> str | None:
    """The label that more than half of the annotators gave, or None."""
    label, count = Counter(votes).most_common(1)[0]
    return label if 2 * count > len(votes) else None


def agreement_level(votes: Sequence[str]) -> str:
    """``all``, ``majority`` or ``none``: of three annotators, 3, 2 or no two say the same."""
    if len(set(votes)) == 1:
        return "all"
    return "majority" if majority(votes) is not None else "none"


def agreement_counts(items: Sequence[Sequence[str]]) -> dict[str, int]:
    """Items by how far their annotators agree."""
    found = Counter(agreement_level(votes) for votes in items)
    return {level: found[level] for level in ("all", "majority", "none")}


def win_rate(wins: float, ties: float, losses: float) -> float:
    """(W + T/2) / N in [0, 1]: 0.5 is a draw between the models."""
    return (wins + ties / 2) / (wins + ties + losses)


def wilson_interval(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share, in [0, 1]; right for rare events, where others are below 0."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    middle = share + z * z / (2 * total)
    half = z * float(np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap_interval(
    items: int,
    statistic: Callable[[np.ndarray], float | None],
    bootstraps: int = 1000,
    seed: int = 1,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | None:
    """The percentile interval of a statistic over items that are drawn again.

    Args:
        items: How many there are.
        statistic: Of indices, int64 [items]; None where it is not defined.
        bootstraps: How many times all items are drawn.
        seed: Of the draws.
        confidence: Share of the bootstraps inside.

    Returns:
        Lower and upper end, or None where the statistic was never defined.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, items, items)) for _ in range(bootstraps)]
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def alpha(counts: np.ndarray, level: Level = "nominal") -> float | None:
    """Krippendorff's alpha: 1 is perfect agreement, 0 is chance.

    Args:
        counts: [items, labels], how many annotators gave an item each label; labels in their order.
        level: ``nominal``, ``ordinal`` or ``interval`` (labels at equal distances).

    Returns:
        None where it isn't defined: all annotators always gave one and the same label.

    Raises:
        ConfigError: The package ``krippendorff`` is not installed.
    """
    if importlib.util.find_spec("krippendorff") is None:
        remedy = "Install it with `pip install 'megatron-chameleon[eval]'`"
        raise ConfigError("alpha", "needs the package krippendorff", remedy)
    import krippendorff

    pairable = counts[counts.sum(axis=1) > 1]
    if not len(pairable) or (pairable.sum(axis=0) > 0).sum() < 2:
        return None
    domain = np.arange(counts.shape[1])
    return float(
        krippendorff.alpha(value_counts=pairable, value_domain=domain, level_of_measurement=level)
    )


def label_counts(items: Sequence[Sequence[str]], labels: Sequence[str]) -> np.ndarray:
    """[items, labels], how many annotators gave an item each label."""
    return np.array([[list(votes).count(label) for label in labels] for votes in items])


def alpha_summary(
    items: Sequence[Sequence[str]], labels: Sequence[str], bootstraps: int, seed: int
) -> dict[str, Any]:
    """Alpha at each level of measurement with its bootstrap interval.

    Args:
        items: Votes of each item.
        labels: In their order, for ``ordinal`` and ``interval``.
        bootstraps: Of the interval.
        seed: Of the draws.
    """
    counts = label_counts(items, labels)

    def drawn(level: Level, rows: np.ndarray) -> float | None:
        return alpha(counts[rows], level)

    return {
        level: {
            "alpha": alpha(counts, level),
            "interval": bootstrap_interval(len(items), partial(drawn, level), bootstraps, seed),
        }
        for level in LEVELS
    }
