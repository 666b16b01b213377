"""Numbers in sentences."""

import doctest
from itertools import pairwise

import pytest

from megatron_chameleon import wording


def test_the_examples_hold() -> None:
    assert doctest.testmod(wording) == (0, 7)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1234567, "1,234,567 images")],
)
def test_counted(count: int, text: str) -> None:
    assert wording.counted(count, "image") == text


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("most", [0, 1, 2, 7, 8])
def test_at_even_distances(count: int, most: int) -> None:
    chosen = wording.at_even_distances(range(count), most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    if most and count:
        assert chosen[0] == 0
        assert chosen[-1] == count - 1 or most == 1
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
