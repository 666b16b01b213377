"""Majorities, intervals and Krippendorff's alpha, against published values."""

import numpy as np
import pytest
from scipy.stats import binomtest

from megatron_chameleon.evaluation.human.statistics import (
    Level,
    agreement_level,
    alpha,
    alpha_summary,
    bootstrap_interval,
    majority,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("votes", "label", "level"),
    [
        (["A", "A", "A"], "A", "all"),
        (["A", "B", "A"], "A", "majority"),
        (["A", "B", "tie"], None, "none"),
        (["A"], "A", "all"),
        (["A", "B"], None, "none"),
        (["A", "A", "B", "B", "tie"], None, "none"),
    ],
)
def test_majority_and_agreement(votes: list[str], label: str | None, level: str) -> None:
    assert majority(votes) == label
    assert agreement_level(votes) == level


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: four observers.
OBSERVED = """
1 2 3 3 2 1 4 1 2 * * *
1 2 3 3 2 2 4 1 2 5 * 3
* 3 3 3 2 3 4 2 2 5 1 *
1 2 3 3 2 4 4 1 2 5 1 *
"""


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(level: Level, published: float) -> None:
    units = zip(*(line.split() for line in OBSERVED.split("\n") if line), strict=True)
    counts = np.array([[list(unit).count(str(value)) for value in range(1, 6)] for unit in units])
    assert alpha(counts, level) == pytest.approx(published, abs=5e-4)


def test_alpha_without_disagreement_in_labels_is_not_defined() -> None:
    assert alpha(np.array([[3, 0], [3, 0]])) is None
    assert alpha(np.array([[1, 0], [0, 1]])) is None, "nobody judged the same item"
    assert alpha(np.array([[3, 0], [0, 3]])) == 1.0
    summary = alpha_summary([["a", "a"], ["a", "a"]], ["a", "b"], 10, 1)
    assert summary["nominal"] == {"alpha": None, "interval": None}


@pytest.mark.parametrize(("count", "total"), [(0, 20), (7, 445), (78, 20_000), (20, 20)])
def test_wilson(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, "wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.repeat([0.0, 1.0], 200)
    low, high = bootstrap_interval(400, lambda rows: float(values[rows].mean()), 2000, 3) or (0, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.008)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.008)
    again = bootstrap_interval(400, lambda rows: float(values[rows].mean()), 2000, 3)
    assert again == (low, high)
