"""Majorities, intervals and Krippendorff's alpha, against published values."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

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
    """The interval contains the shares that a normal test at the same level does not reject."""
    z = NormalDist().inv_cdf(0.975)
    for end in wilson_interval(count, total):
        distance = abs(count / total - end)
        assert distance == pytest.approx(z * np.sqrt(end * (1 - end) / total), abs=1e-12)
    low, high = wilson_interval(count, total)
    assert 0 <= low < high <= 1


def test_wilson_of_a_published_example() -> None:
    """Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I."""
    for count, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(count, total) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.repeat([0.0, 1.0], 200)
    low, high = bootstrap_interval(400, lambda rows: float(values[rows].mean()), 2000, 3) or (0, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.008)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.008)
    again = bootstrap_interval(400, lambda rows: float(values[rows].mean()), 2000, 3)
    assert again == (low, high)


def test_bootstrap_draws_what_scipy_draws() -> None:
    points = np.repeat([1.0, 0.5, 0.0], [435, 362, 251])
    expected = stats.bootstrap(
        (points,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(len(points), lambda rows: float(points[rows].mean()), 1000, 1)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_where_scipy_has_no_interval() -> None:
    """A single item, and a statistic that some resamples leave undefined."""
    assert bootstrap_interval(1, lambda rows: 0.25, 10) == (0.25, 0.25)
    counts = np.array([[3, 0], [3, 0], [0, 3]])
    assert bootstrap_interval(3, lambda rows: alpha(counts[rows]), 50) == (1.0, 1.0)
