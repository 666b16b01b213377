"""Tokens per block: the worked example, exactness over long runs, and the last whole block."""

import doctest
import math
from fractions import Fraction

import pytest

from megatron_chameleon.data.mixture import phases
from megatron_chameleon.data.mixture.phases import TokensPerBlock, plan_rates


def test_the_example_in_the_docstring_is_right():
    failed, tried = doctest.testmod(phases)
    assert failed == 0 and tried >= 4


@pytest.mark.parametrize("share", [1 / 3, 0.45, 0.0001, 1.0])
def test_positions_are_those_of_exact_fractions(share):
    rate = TokensPerBlock.of_share(share, 2048 * 4096)
    exact = Fraction(rate.units, 2**52)
    assert math.isclose(exact, share * 2048 * 4096, rel_tol=1e-12)
    for block in (0, 1, 7, 10**6, 10**12):
        assert rate.before(block) == math.floor(exact * block)


@pytest.mark.parametrize("share", [1 / 3, 0.45, 0.9999])
def test_blocks_within_is_the_largest_number(share):
    rate = TokensPerBlock.of_share(share, 1000)
    for tokens in (999, 1000, 123_456, 10**12):
        blocks = rate.blocks_within(tokens)
        assert rate.before(blocks) <= tokens < rate.before(blocks + 1)


def test_a_source_that_runs_out_gives_what_it_has_to_one_block():
    found, blocks = plan_rates({"a": 3.0, "b": 1.0}, {"a": 70, "b": None}, lambda shares: 100)
    assert {key: rate.whole_tokens for key, rate in found.items()} == {"a": 70, "b": 30}
    assert blocks == 1
    found, blocks = plan_rates({"a": 3.0, "b": 1.0}, {"a": 160, "b": None}, lambda shares: 100)
    assert {key: rate.whole_tokens for key, rate in found.items()} == {"a": 75, "b": 25}
    assert blocks == 2
