"""Reads the digit that a caption names, and scores predictions."""

import re
from collections.abc import Sequence

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_NUMBER = re.compile(rf"\b(?:({'|'.join(NUMBER_WORDS)})|([0-9]))\b", re.IGNORECASE)


def first_digit(caption: str) -> int | None:
    """The first number from 0 to 9 in a caption, as a word or as a separate digit; else None."""
    match = _NUMBER.search(caption)
    if match is None:
        return None
    return NUMBER_WORDS.index(match[1].lower()) if match[1] else int(match[2])


def accuracy(predictions: Sequence[int | None], labels: Sequence[int]) -> float:
    """Share of the predictions that equal their label, in [0, 1]; None is always wrong.

    Args:
        predictions: One for each label.
        labels: The right classes; at least one.
    """
    pairs = zip(predictions, labels, strict=True)
    return sum(prediction == label for prediction, label in pairs) / len(labels)


def confusion(
    predictions: Sequence[int | None], labels: Sequence[int], classes: int
) -> list[list[int]]:
    """Confusion matrix: counts by [label][prediction]. The last column counts None.

    Args:
        predictions: In [0, classes), or None.
        labels: In [0, classes).
        classes: The number of classes.
    """
    counts = [[0] * (classes + 1) for _ in range(classes)]
    for prediction, label in zip(predictions, labels, strict=True):
        counts[label][classes if prediction is None else prediction] += 1
    return counts
