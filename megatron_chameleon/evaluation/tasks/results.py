"""Results of a task: the scored items, and the figures over all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chameleon.evaluation.asking.answer_cache import value_digest


@dataclass(frozen=True)
class ScoredItem:
    """One item of a task with the model's answer and its scores."""

    id: str
    prompt: Any
    """A text, or parts as ``prompt_as_json`` returns them."""
    answer: Any
    """The model's text, or the log-likelihoods of the candidates."""
    reference: Any
    scores: Mapping[str, float]
    """The item's score by the name of the figure."""


@dataclass(frozen=True)
class TaskResult:
    """What a task measured."""

    name: str
    metric: str
    shots: int
    scored_items: Sequence[ScoredItem]
    paper: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 100.0
    """Factor from scores to figures: percent, and CIDEr times 100 as it is usually reported."""

    def figures(self) -> dict[str, dict[str, float]]:
        """Mean and standard error of every score, multiplied by ``scale``."""
        names = sorted({name for scored_item in self.scored_items for name in scored_item.scores})
        found = {}
        for name in names:
            values = [s.scores[name] for s in self.scored_items if name in s.scores]
            mean, error = mean_and_error(values)
            found[name] = {
                "value": self.scale * mean,
                "standard_error": self.scale * error,
                "items": len(values),
            }
        return found

    def summary(self) -> dict[str, Any]:
        """The task's entry in ``results.json``."""
        figures = self.figures()
        return {
            "metric": self.metric,
            **figures[self.metric],
            "shots": self.shots,
            "paper": dict(self.paper),
            "prompts_fingerprint": value_digest(
                [scored_item.prompt for scored_item in self.scored_items]
            ),
            "settings": dict(self.settings),
            "figures": figures,
        }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, from the sample variance; 0 for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the figures beside the paper's, one line per task.

    Args:
        results: ``TaskResult.summary()`` of each task, by its name.
    """
    width = max(len(name) for name in [*results, "task"])
    lines = [
        f"{'task':<{width}}  {'metric':<26} {'value':>7} {'±':>5} {'items':>6} {'shots':>5}"
        f"  {'paper 7B':>8} {'34B':>6}"
    ]
    for name, result in results.items():
        seven, thirty_four = (
            f"{result['paper'][size]:.1f}" if size in result["paper"] else "-"
            for size in ("7B", "34B")
        )
        lines.append(
            f"{name:<{width}}  {result['metric']:<26} {result['value']:>7.1f}"
            f" {result['standard_error']:>5.1f} {result['items']:>6} {result['shots']:>5}"
            f"  {seven:>8} {thirty_four:>6}"
        )
    return "\n".join(lines)
