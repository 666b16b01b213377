"""Scores human judgements: whether a task is fulfilled, which answer is better, what is safe.

The paper has three annotators per item (sections 4 and 5); any number works. The label of the
majority counts. Without a majority, a comparison is a tie, a safety judgement is ``unsure``, and a
judgement of fulfilment has the label ``none``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.human.statistics import (
    agreement_counts,
    alpha_summary,
    bootstrap_interval,
    majority,
    wilson_interval,
    win_rate,
)

LABELS: Mapping[str, tuple[str, ...]] = {
    "absolute": ("fully", "partially", "not"),
    "pairwise": ("A", "tie", "B"),
    "safety": ("safe", "unsure", "unsafe"),
}
"""The labels of each kind of questionnaire, in their natural order."""
WITHOUT_MAJORITY = {"pairwise": "tie", "safety": "unsure", "absolute": "none"}


@dataclass(frozen=True)
class Judgement:
    """One annotator's label for one item."""

    item: str
    annotator: str
    label: str
    category: str = ""
    modality: str = ""


def score_judgements(
    kind: str, judgements: Sequence[Judgement], bootstraps: int = 1000, seed: int = 1
) -> dict[str, Any]:
    """All figures of a questionnaire.

    Args:
        kind: ``absolute``, ``pairwise`` or ``safety``.
        judgements: At least one.
        bootstraps: The number of resamples for each interval.
        seed: Seed of the resampling.

    Returns:
        Counts, shares, win rate and intervals under ``all`` and, for each group, under
        ``categories`` and ``modalities``; ``agreement``; ``alpha``; and ``incomplete_items``, the
        number of items that have fewer annotators than others.

    Raises:
        DataError: A label is unknown, or an annotator judged an item twice.
    """
    votes = collect_votes(kind, judgements)
    items = list(votes.values())
    first = {judgement.item: judgement for judgement in reversed(judgements)}
    most = max(len(labels) for labels in items)
    result: dict[str, Any] = {
        "kind": kind,
        "items": len(items),
        "annotators_per_item": most,
        "incomplete_items": sum(len(labels) < most for labels in items),
        "all": _figures(kind, items, bootstraps, seed),
        "agreement": agreement_counts(items),
        "alpha": alpha_summary(items, LABELS[kind], bootstraps, seed),
    }
    for name, key in (("categories", "category"), ("modalities", "modality")):
        groups: dict[str, list[list[str]]] = {}
        for item, labels in votes.items():
            if group := getattr(first[item], key):
                groups.setdefault(group, []).append(labels)
        result[name] = {
            group: _figures(kind, members, bootstraps, seed)
            for group, members in sorted(groups.items(), key=lambda pair: -len(pair[1]))
        }
    return result


def collect_votes(kind: str, judgements: Iterable[Judgement]) -> dict[str, list[str]]:
    """The labels that each item received.

    Raises:
        DataError: A label is unknown, or an annotator judged an item twice.
    """
    votes: dict[str, dict[str, str]] = {}
    for judgement in judgements:
        where = f"item {judgement.item}, annotator {judgement.annotator}"
        if judgement.label not in LABELS[kind]:
            remedy = f"Use {', '.join(LABELS[kind])}"
            raise DataError(where, f"the label {judgement.label!r} is unknown", remedy)
        given = votes.setdefault(judgement.item, {})
        if judgement.annotator in given:
            raise DataError(
                where,
                "the item is judged twice",
                "Keep one judgement, or name the annotators apart",
            )
        given[judgement.annotator] = judgement.label
    return {item: list(given.values()) for item, given in votes.items()}


def _figures(
    kind: str, items: Sequence[Sequence[str]], bootstraps: int, seed: int
) -> dict[str, Any]:
    decided = [majority(labels) or WITHOUT_MAJORITY[kind] for labels in items]
    return figures_of_counts(kind, Counter(decided), bootstraps, seed)


def figures_of_counts(
    kind: str, counts: Mapping[str, int], bootstraps: int = 1000, seed: int = 1
) -> dict[str, Any]:
    """Shares with Wilson's intervals and, for ``pairwise``, A's win rate with a bootstrap interval.

    Args:
        kind: ``absolute``, ``pairwise`` or ``safety``.
        counts: The number of items by their decided label.
        bootstraps: The number of resamples for the interval of the win rate.
        seed: Seed of the resampling.
    """
    labels = LABELS[kind] + (("none",) if counts.get("none") else ())
    total = sum(counts.values())
    figures: dict[str, Any] = {
        "items": total,
        "counts": {label: counts.get(label, 0) for label in labels},
        "shares": {label: counts.get(label, 0) / total for label in labels},
        "intervals": {label: wilson_interval(counts.get(label, 0), total) for label in labels},
    }
    if kind == "pairwise":
        wins, ties, losses = (counts.get(label, 0) for label in ("A", "tie", "B"))
        points = np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])
        figures["win_rate"] = win_rate(wins, ties, losses)
        figures["win_rate_interval"] = bootstrap_interval(
            total, lambda rows: float(points[rows].mean()), bootstraps, seed
        )
    return figures


def score_table(result: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """The figures as a table.

    Args:
        result: What ``score_judgements`` returns.
        names: The names of the models, by ``A`` and ``B``.
    """
    kind = result["kind"]
    rows = [("all", result["all"])]
    rows += [*result["modalities"].items(), *result["categories"].items()]
    width = max(len(name) for name, _ in rows)
    lines = (
        [f"{key} is {name}" for key, name in (names or {}).items()] if kind == "pairwise" else []
    )
    lines += [f"{name:<{width}}  {_table_row(kind, figures)}" for name, figures in rows]
    levels = result["agreement"]
    shares = ", ".join(
        f"{name} {count} ({100 * count / result['items']:.1f}%)"
        for name, count in zip(("all agree", "a majority", "none"), levels.values(), strict=True)
    )
    lines.append(f"of {result['annotators_per_item']} annotators per item: {shares}")
    for level, found in result["alpha"].items():
        if found["alpha"] is not None:
            low, high = found["interval"] or (float("nan"), float("nan"))
            lines.append(
                f"Krippendorff's alpha, {level}: {found['alpha']:.3f} [{low:.3f}, {high:.3f}]"
            )
    if result["incomplete_items"]:
        lines.append(f"{result['incomplete_items']} items have fewer annotators than the others")
    return "\n".join(lines)


def _table_row(kind: str, figures: Mapping[str, Any]) -> str:
    parts = []
    for label, count in figures["counts"].items():
        low, high = figures["intervals"][label]
        share = 100 * figures["shares"][label]
        parts.append(f"{label} {count} ({share:.1f}% [{100 * low:.1f}, {100 * high:.1f}])")
    if kind == "pairwise":
        low, high = figures["win_rate_interval"]
        rate = f"win rate of A {100 * figures['win_rate']:.1f}%"
        parts.append(f"{rate} [{100 * low:.1f}, {100 * high:.1f}]")
    return f"{figures['items']:>6} items · " + " · ".join(parts)
