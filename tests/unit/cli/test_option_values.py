"""Every number of every option: within its limits, or refused in one line that says what they are.

The options are read from the parsers (``value_table``), so a new one is tested by itself.
"""

import argparse
import math

import pytest
from value_table import VALUES, Option, options, parsers

from megatron_chameleon.cli.main import main
from megatron_chameleon.cli.options import SHARE, NumberOption, device
from megatron_chameleon.cli.single_values import StoreOnce
from megatron_chameleon.masking import is_secret_name

NUMBER_OPTIONS = [option for option in options() if option.is_number]


def test_the_table_is_not_empty() -> None:
    assert len(NUMBER_OPTIONS) > 35
    assert {option.verb[0] for option in NUMBER_OPTIONS} >= {"plan", "tokenizer", "generate"}


def test_every_number_has_limits() -> None:
    """``int`` and ``float`` as the type of an option take nan, inf and 10^30."""
    assert [str(option) for option in options() if option.action.type in (int, float)] == []


def test_an_option_with_one_value_refuses_two_that_differ() -> None:
    """argparse keeps the last one, and says nothing."""
    checked = 0
    for name, parser in parsers():
        for action in parser._actions:
            assert type(action).__name__ != "_StoreAction", f"{name}: {action.dest}"
            if not isinstance(action, StoreOnce) or not action.option_strings:
                continue
            space = argparse.Namespace()
            action(parser, space, "one")
            action(parser, space, "one")
            with pytest.raises(
                argparse.ArgumentError, match="takes one value, and two differ"
            ) as e:
                action(parser, space, "two")
            assert ("'two'" in str(e.value)) != is_secret_name(action.dest), (
                f"{name}: {action.dest}"
            )
            action(parser, argparse.Namespace(), "two")  # another use of the parser
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat x --prompt A --prompt B", "--prompt: takes one value, and two differ: 'A' and 'B'."),
        ("generate x --seed 1 --seed=2", "--seed: takes one value, and two differ: 1 and 2."),
        (
            "train x --resume auto a.b=1 --resume never",
            "--resume: takes one value, and two differ:",
        ),
        ("tokenizer image x --output a --output b", "--output: takes one value, and two differ:"),
        ("generate x --force text --force image", "--force: takes one value, and two differ:"),
        ("plan x --gpus 8 --gpu h100 --gpus 64", "--gpus: takes one value, and two differ: 8 and"),
    ],
)
def test_two_values_are_refused_in_a_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("option", NUMBER_OPTIONS, ids=str)
def test_a_number_is_within_its_limits_or_refused(option: Option) -> None:
    kind = option.action.type
    assert isinstance(kind, NumberOption)
    for text in (*VALUES, "", " ", "1" * 10_000, "0x10", "1e400", "-0", "1_0", "1e3", "true", "½"):
        try:
            value = kind(text)
        except argparse.ArgumentTypeError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 200
            assert " is not a " in str(error)
        else:
            assert isinstance(value, kind.kind)
            assert kind.constraint.allows(value)
            assert math.isfinite(value)
    default = option.action.default
    assert default is None or kind.constraint.allows(default)
    for bad in ("nan", "inf", "-1", "1e30", "word", "1" + "0" * 30):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(bad)


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    (top,) = (option for option in NUMBER_OPTIONS if str(option) == "plan --top")
    assert isinstance(top.action.type, NumberOption)
    assert top.action.type("1e3") == 1000
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'1.5' is not a whole number between"):
        top.action.type("1.5")
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number between 0 and 1$"):
        SHARE("1.5")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["plan", "chameleon_7b", "--gpu", "h100", "--gpus", "nan"],
            "error: --gpus: 'nan' is not a whole number between 1 and 1,000,000. "
            "See `chameleon plan --help`.",
        ),
        (
            ["generate", "x", "--prompt", "a", "--temperature", "inf"],
            "error: --temperature: 'inf' is not a number between 0 and 100. "
            "See `chameleon generate --help`.",
        ),
        (
            ["plan", "chameleon_7b", "--gpu", "h100", "--gpus", "8", "--topp", "1"],
            "error: unrecognized arguments: --topp 1. See `chameleon --help`.",
        ),
        (
            ["evaluate", "x", "--tasks", "list", "--device", "gpu"],
            "error: --device: 'gpu' is not cpu, cuda or cuda:N. See `chameleon evaluate --help`.",
        ),
        (
            ["plan", "chameleon_7b"],
            "error: the following arguments are required: --gpus, --gpu. "
            "See `chameleon plan --help`.",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_a_long_or_unprintable_word_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("x" * 100_000, "\x1b[31mred", "a\nb"):
        with pytest.raises(SystemExit) as end:
            main(["plan", "chameleon_7b", "--gpus", "8", "--gpu", word])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert len(line) < 500
        assert line.isprintable()


def test_devices() -> None:
    assert [device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


def test_every_parser_reports_in_one_line() -> None:
    for words, parser in parsers():
        assert type(parser).__name__ == "Parser", words
