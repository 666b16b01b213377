"""Answers and references: what counts as the same, in words, signs, symbols and scripts."""

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.tasks.items import check_references
from megatron_chameleon.evaluation.tasks.matching import contains, exact_match


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("A", "A"),
        ("a.", "A"),
        ("Zero.", "zero"),
        ("zero", "Zero."),
        ("**zero**", "zero"),
        ('"zero".', "zero"),
        ("(b)", "b"),
        ("Yes!", "yes"),
        ("x\u00b2", "x^2"),
        ("1\u00bd", "1 1/2"),
        ("\u22125", "-5"),
        ("\uff21\uff22", "ab"),
        ("STRASSE", "stra\u00dfe"),
        ("e\u0301", "\u00e9"),
        (" zero\u200b\n", "zero"),
        ("it\u2019s", "it's"),
        (".", "."),
        ("#", "#"),
        ("\u96f6\u3002", "\u96f6"),
    ],
)
def test_the_same_answer_in_another_spelling(answer: str, reference: str) -> None:
    assert exact_match(answer, ["other", reference]) == 1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", "A"),
        ("", "the"),
        ("The", "A"),
        ("-5", "5"),
        ("5", "-5"),
        ("+5", "5"),
        ("15", "1.5"),
        ("$5", "5"),
        ("5", "5%"),
        ("5\u00b0", "5"),
        ("C", "C++"),
        ("C#", "C"),
        ("52", "5\u00b2"),
        ("112", "1\u00bd"),
        ("5", "5!"),
        ("", "."),
        ("dogs", "dog"),
        ("the dog", "dog"),
        ("[0, 1)", "[0, 1]"),
        ("", ""),
        (" ", "\u200b"),
    ],
)
def test_another_answer(answer: str, reference: str) -> None:
    assert exact_match(answer, [reference]) == 0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It is A.", "A"),
        ("in C, mostly", "C"),
        ("I use C++.", "C++"),
        ("the answer is -5.", "-5"),
        ("answer:zero", "zero"),
        ("the dog's tail", "dog"),
        ("yes/no", "no"),
        ("**5**", "5"),
        ("x=5", "5"),
        ("a 'dog'", "dog"),
        ("is it 5?", "5"),
        ("a\u00a0b c", "A B"),
        ("\u7b54\u6848\u662f\u96f6\u3002", "\u96f6"),
    ],
)
def test_a_whole_word_is_contained(answer: str, reference: str) -> None:
    assert contains(answer, [reference]) == 1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("cat", "A"),
        ("-5", "5"),
        ("x=-5", "5"),
        ("1.5", "5"),
        ("1.5", "1"),
        (".5", "5"),
        ("5.0", "5"),
        ("15", "5"),
        ("5th", "5"),
        ("5%", "5"),
        ("$5", "5"),
        ("<5", "5"),
        ("5^2", "5"),
        ("1/2", "2"),
        ("10:30", "30"),
        ("1,500", "500"),
        ("C++ or C#", "C"),
        ("don't", "don"),
        ("non-zero", "zero"),
        ("cat_dog", "cat"),
        ("caf\u00e9", "cafe"),
        ("\u0915\u0940", "\u0915"),
        ("anything", ""),
        ("anything", " \ufeff"),
    ],
)
def test_a_part_of_a_word_is_not_contained(answer: str, reference: str) -> None:
    assert contains(answer, [reference]) == 0


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("exact_match", " \u200b"),
        ("contains", ""),
        ("first_digit", "no number"),
        ("words", "?!"),
        ("accuracy", "\n"),
        ("acc", " "),
    ],
)
def test_a_reference_of_which_nothing_is_left_is_an_error(metric: str, reference: str) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl:3: nothing is left of the .* by {metric}\. C"):
        check_references(metric, ["1 zero", reference], "d.jsonl:3")
    check_references(metric, ["1 zero"], "d.jsonl:3")
