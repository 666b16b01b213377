"""Numbers in sentences."""

import doctest

import pytest

from megatron_chameleon import wording


def test_the_examples_hold() -> None:
    assert doctest.testmod(wording) == (0, 6)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1234567, "1,234,567 images")],
)
def test_counted(count: int, text: str) -> None:
    assert wording.counted(count, "image") == text
