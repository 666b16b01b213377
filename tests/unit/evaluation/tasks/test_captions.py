"""Digits that captions name."""

import pytest

from megatron_chameleon.evaluation.tasks.captions import accuracy, confusion, first_digit


@pytest.mark.parametrize(
    ("caption", "digit"),
    [
        ("a handwritten three", 3),
        ("THE DIGIT Seven.", 7),
        ("handwriting: 4", 4),
        ("the digit 8, also called eight", 8),
        ("Nine or one", 9),
        ("someone wrote a five", 5),
        ("seventeen and 42", None),
        ("zeroes", None),
        ("", None),
    ],
)
def test_first_digit(caption: str, digit: int | None) -> None:
    assert first_digit(caption) == digit


def test_accuracy_counts_nothing_as_wrong() -> None:
    assert accuracy([1, 2, None, 4], [1, 2, 3, 0]) == 0.5


def test_confusion_has_labels_as_rows_and_none_last() -> None:
    assert confusion([0, 1, 1, None], [0, 0, 1, 1], 2) == [[1, 1, 0], [0, 1, 1]]
