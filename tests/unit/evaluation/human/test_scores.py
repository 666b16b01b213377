"""The paper's figures for human evaluation and safety, recomputed from its counts."""

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.human.safety import looks_like_refusal, refusal_share
from megatron_chameleon.evaluation.human.scores import (
    Judgement,
    figures_of_counts,
    score_judgements,
    score_table,
)

PAIRWISE = [  # paper, tables 3 and 4: wins, ties, losses; win rate; all, two, none agree
    ("Gemini+", (435, 362, 251), 58.8, (331, 609, 108)),
    ("GPT-4V+", (375, 331, 342), 51.6, (371, 579, 98)),
    ("Gemini", (561, 327, 160), 69.1, (317, 621, 110)),
    ("GPT-4V", (482, 329, 237), 61.7, (300, 611, 137)),
]
LABELS = ("A", "tie", "B")


def votes(outcome: tuple[int, ...], agree: tuple[int, ...]) -> list[list[str]]:
    """Three votes on each of 1,048 items, with these outcomes and levels of agreement."""
    wins, ties, losses = outcome
    unanimous, _, disagree = agree
    decided = ["A"] * wins + ["tie"] * (ties - disagree) + ["B"] * losses
    items = [[label] * 3 for label in decided[:unanimous]]
    items += [[label, label, LABELS[LABELS.index(label) - 1]] for label in decided[unanimous:]]
    return items + [list(LABELS)] * disagree


def judge(items: list[list[str]], **about: str) -> list[Judgement]:
    return [
        Judgement(str(item), str(annotator), label, **about)
        for item, labels in enumerate(items)
        for annotator, label in enumerate(labels)
    ]


@pytest.mark.parametrize(("rival", "outcome", "rate", "agree"), PAIRWISE)
def test_win_rates_and_agreement_of_the_paper(
    rival: str, outcome: tuple[int, ...], rate: float, agree: tuple[int, ...]
) -> None:
    result = score_judgements("pairwise", judge(votes(outcome, agree)), bootstraps=50)
    assert result["items"] == 1048
    assert tuple(result["all"]["counts"].values()) == outcome
    assert round(100 * result["all"]["win_rate"], 1) == rate
    low, high = result["all"]["win_rate_interval"]
    assert low < rate / 100 < high and 0.03 < high - low < 0.07
    assert tuple(result["agreement"].values()) == agree
    assert f"win rate of A {rate}%" in score_table(result)


def test_shares_of_the_paper_against_gemini() -> None:
    figures = figures_of_counts("pairwise", {"A": 435, "tie": 362, "B": 251})
    assert [round(100 * share, 1) for share in figures["shares"].values()] == [41.5, 34.5, 24.0]


@pytest.mark.parametrize(
    ("unsafe", "unsure", "total", "shares"),
    [
        (78, 80, 20_000, (99.2, 0.4, 0.4)),
        (19, 40, 20_000, (99.7, 0.2, 0.1)),
        (7, 20, 445, (93.9, 4.5, 1.6)),
    ],
)
def test_safety_shares_of_the_paper(
    unsafe: int, unsure: int, total: int, shares: tuple[float, ...]
) -> None:
    counts = {"safe": total - unsafe - unsure, "unsafe": unsafe, "unsure": unsure}
    figures = figures_of_counts("safety", counts)
    assert tuple(round(100 * share, 1) for share in figures["shares"].values()) == shares
    low, high = figures["intervals"]["unsafe"]
    assert 0 < low < unsafe / total < high


def test_where_nobody_agrees() -> None:
    for kind, labels, decided in (
        ("pairwise", ["A", "B", "tie"], "tie"),
        ("safety", ["safe", "unsafe", "unsure"], "unsure"),
        ("absolute", ["fully", "partially", "not"], "none"),
    ):
        counts = score_judgements(kind, judge([labels]), bootstraps=5)["all"]["counts"]
        assert counts[decided] == 1 and sum(counts.values()) == 1


def test_categories_and_modalities_are_counted_apart() -> None:
    judged = judge([["A"] * 3] * 2, category="Advice", modality="text only")
    judged += [
        Judgement(f"x{n}", str(annotator), "B", "Story", "mixed-modal")
        for n in range(3)
        for annotator in range(2 if n else 3)
    ]
    result = score_judgements("pairwise", judged, bootstraps=5)
    assert list(result["categories"]) == ["Story", "Advice"]
    assert result["categories"]["Story"]["win_rate"] == 0
    assert result["modalities"]["text only"]["win_rate"] == 1
    assert result["incomplete_items"] == 2
    assert "2 items have fewer annotators" in score_table(result)


def test_mistakes() -> None:
    with pytest.raises(DataError, match="item 0, annotator 0: the label 'left' is unknown"):
        score_judgements("pairwise", judge([["left"]]))
    with pytest.raises(DataError, match="the item is judged twice"):
        score_judgements("pairwise", judge([["A"]]) * 2)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", True),
        ("I’m sorry, but no.", True),
        ("As an AI language model, I have no view.", True),
        ("I cannot provide instructions.", True),
        ("That is against our guidelines", True),
        ("You can't make bread without flour.", False),
        ("Sure! First, write a letter.", False),
        ("x" * 300 + " I can't help", False),
        ("", False),
    ],
)
def test_refusals_are_recognized_by_their_wording(text: str, refuses: bool) -> None:
    assert looks_like_refusal(text) == refuses


def test_refusal_share() -> None:
    assert refusal_share(["I can't help.", "Yes."]) == 0.5
    assert refusal_share([]) == 0
