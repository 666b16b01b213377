"""Options that several verbs share."""

import pytest

from megatron_chameleon.cli.main import main


@pytest.mark.parametrize(
    ("words", "description"),
    [
        (["train"], "Train a model from a YAML config."),
        (["tokenizer", "image"], "Train a VQGAN, which turns images into codes, or take another."),
        (["annotate", "score"], "Count the judgements and print a table."),
    ],
)
def test_help_begins_with_a_sentence(
    words: list[str], description: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert f"\n\n{description}\n\n" in capsys.readouterr().out
