"""VQA accuracy: the formula of the challenge and its answer normalisation."""

import pytest

from megatron_chameleon.evaluation.tasks.vqa import normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Two dogs", "2 dogs"),
        ("none", "0"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5 miles.", "3.5 miles"),
        ("dont know", "don't know"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("shouldntve", "shouldntve"),
        ("shouldn'tve", "shouldn't've"),
        ("yes!", "yes "[:3]),
        ("", ""),
    ],
)
def test_normalise(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


@pytest.mark.parametrize(
    ("said", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_accuracy_leaves_each_annotator_out(said: int, expected: float) -> None:
    references = ["yes"] * said + ["no"] * (10 - said)
    assert vqa_accuracy("Yes", references if said < 10 else ["Yes"] * 10) == pytest.approx(expected)


def test_unanimous_answers_are_compared_unchanged() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0.0
    assert vqa_accuracy("two", ["2"] * 9 + ["a 2"]) == 1.0
