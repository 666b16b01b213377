"""Statistics of annotators' votes: majority, agreement, intervals and Krippendorff's alpha.

Sources: paper, sections 4.2 to 4.4; Krippendorff, "Content Analysis", for alpha. The packages
``krippendorff`` and ``scipy`` compute alpha and Wilson's interval.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_chameleon.errors import ConfigError

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")
CONFIDENCE = 0.95


def majority(votes: Sequence[str]) -> str | None:
    """The label that more than half of the annotators gave; None if there is no such label."""
    label, count = Counter(votes).most_common(1)[0]
    return label if 2 * count > len(votes) else None


def agreement_level(votes: Sequence[str]) -> str:
    """How far the annotators agree: ``all``, ``majority`` or ``none``.

    Of three annotators, all three, two, or no two of them gave the same label.
    """
    if len(set(votes)) == 1:
        return "all"
    return "majority" if majority(votes) is not None else "none"


def agreement_counts(items: Sequence[Sequence[str]]) -> dict[str, int]:
    """The number of items at each level of agreement."""
    found = Counter(agreement_level(votes) for votes in items)
    return {level: found[level] for level in ("all", "majority", "none")}


def win_rate(wins: float, ties: float, losses: float) -> float:
    """(W + T/2) / N, in [0, 1]; 0.5 means that the models are equally good."""
    return (wins + ties / 2) / (wins + ties + losses)


def wilson_interval(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share, in [0, 1].

    It is right for rare events too, where the usual interval goes below 0.
    """
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    items: int,
    statistic: Callable[[np.ndarray], float | None],
    bootstraps: int = 1000,
    seed: int = 1,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a statistic over items.

    ``scipy.stats.bootstrap`` draws the same items from the same seed, but it refuses a single item,
    and one resample where the statistic is undefined makes its whole interval undefined. Here such
    resamples are left out.

    Args:
        items: The number of items.
        statistic: Computes the statistic from the indices of the drawn items, int64 [items], or
            returns None where it is undefined.
        bootstraps: The number of resamples.
        seed: Seed of the resampling.
        confidence: Share of the resamples that lie inside the interval.

    Returns:
        The lower and the upper end, or None if the statistic was undefined in every resample.
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
        counts: [items, labels], how many annotators gave each label to an item, with the labels
            in their natural order.
        level: ``nominal``, ``ordinal`` or ``interval`` (labels at equal distances).

    Returns:
        Alpha, or None where it is undefined: no item has two votes, or all votes are the same.

    Raises:
        ConfigError: The package ``krippendorff`` is not installed.
    """
    if importlib.util.find_spec("krippendorff") is None:
        remedy = "Install it with `pip install 'megatron-chameleon[eval]'`"
        raise ConfigError("alpha", "the package krippendorff is not installed", remedy)
    import krippendorff

    pairable = counts[counts.sum(axis=1) > 1]
    if not len(pairable) or (pairable.sum(axis=0) > 0).sum() < 2:
        return None
    domain = np.arange(counts.shape[1])
    return float(
        krippendorff.alpha(value_counts=pairable, value_domain=domain, level_of_measurement=level)
    )


def label_counts(items: Sequence[Sequence[str]], labels: Sequence[str]) -> np.ndarray:
    """How many annotators gave each label to each item: [items, labels]."""
    return np.array([[list(votes).count(label) for label in labels] for votes in items])


def alpha_summary(
    items: Sequence[Sequence[str]], labels: Sequence[str], bootstraps: int, seed: int
) -> dict[str, Any]:
    """Alpha and its bootstrap interval at each level of measurement.

    Args:
        items: The votes on each item.
        labels: All labels in their natural order, which ``ordinal`` and ``interval`` use.
        bootstraps: The number of resamples for the interval.
        seed: Seed of the resampling.
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
