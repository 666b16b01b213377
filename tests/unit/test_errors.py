"""How an error of the user is printed: three parts, each closed by one mark."""

import doctest

from megatron_chameleon import errors
from megatron_chameleon.errors import ConfigError, ConfigErrors


def test_parts_without_a_mark_get_a_full_stop() -> None:
    assert str(ConfigError("x.yaml", "2 is odd", "Use 3")) == "x.yaml: 2 is odd. Use 3."


def test_a_part_with_its_own_mark_gets_no_second_one() -> None:
    question = ConfigError("x.yaml", "Unknown key", "Did you mean `model.num_layers`?")
    assert str(question) == "x.yaml: Unknown key. Did you mean `model.num_layers`?"
    assert str(ConfigError("a", "The end!", "Stop.")) == "a: The end! Stop."


def test_each_problem_of_several_is_closed_on_its_own() -> None:
    several = ConfigErrors([ConfigError("a", "b", "Why?"), ConfigError("d", "e", "f")])
    assert several.lines() == ["a: b. Why?", "d: e. f."]


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(errors)
    assert result.attempted == 4
    assert result.failed == 0
