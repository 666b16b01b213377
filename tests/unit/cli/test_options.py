"""Options that several verbs share."""

import argparse

import pytest

from megatron_chameleon.cli.main import main
from megatron_chameleon.cli.options import check_at_least_1
from megatron_chameleon.errors import ConfigError


def test_a_number_below_1_is_refused_by_its_option() -> None:
    args = argparse.Namespace(batch_size=0, limit=None, count=1)
    check_at_least_1(args, "limit", "count", "no_such_option")
    with pytest.raises(ConfigError, match=r"^--batch-size: 0 is below 1\. Use 1 or more\.$"):
        check_at_least_1(args, "count", "batch_size")


@pytest.mark.parametrize(
    ("words", "description"),
    [
        (["train"], "Train a model from a YAML config."),
        (["tokenizer", "image"], "Train a VQGAN, which turns images into codes."),
        (["annotate", "score"], "Count the judgements and print a table."),
    ],
)
def test_help_begins_with_a_sentence(
    words: list[str], description: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert f"\n\n{description}\n\n" in capsys.readouterr().out
