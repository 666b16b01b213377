"""Held-out documents that a run is trained on after all: found by what the sidecars say."""

import pytest

from megatron_chameleon.config.schema import Config, SourceConfig, ValidationSourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.preprocess.options import EncodeOptions, PreprocessOptions
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.validation.reader import HeldOutReader


@pytest.fixture
def warnings(tmp_path, tokenizer, tokenizer_folder, write_lines):
    """Warnings of a run that is trained on one token file; the validation is on ``a-holdout``."""
    documents = [{"text": f"number {i}"} for i in range(60)]
    path = write_lines("d.jsonl", *documents)
    other = write_lines("other.jsonl", *documents)
    for name, share, source in (("a", 0.2, path), ("b", 0.1, path), ("c", 0.4, path)):
        options = PreprocessOptions(encoding=EncodeOptions(holdout=share))
        preprocess([source], tokenizer_folder, tmp_path / name, options)
    preprocess([path], tokenizer_folder, tmp_path / "all")
    preprocess([other], tokenizer_folder, tmp_path / "elsewhere")

    def of(name):
        config = Config()
        config.model.seq_length = 16
        config.data.stage1 = [SourceConfig(str(tmp_path / name))]
        held_out = str(tmp_path / "a-holdout")
        config.data.validation.sources = [ValidationSourceConfig(held_out)]
        reader = BatchReader(config, tokenizer)
        found = reader.warnings() + HeldOutReader(config, tokenizer).warnings(reader.sources)
        return [line.replace(str(tmp_path), "FOLDER") for line in found]

    return of


def test_documents_that_are_safe(warnings) -> None:
    assert warnings("a") == []
    assert warnings("c") == []  # the larger share holds out all that the smaller one does
    assert warnings("elsewhere") == []  # nobody can know


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("all", "was held out of FOLDER/d.jsonl, and all documents of this file are also in"),
        ("b", "holds out 0.2 of FOLDER/d.jsonl, but only 0.1 of it is left out of"),
        ("b-holdout", "was held out of FOLDER/d.jsonl, whose documents are divided in another way"),
        ("a-holdout", "is also data.stage1[0], so the model is trained on these documents"),
    ],
)
def test_documents_that_are_trained(warnings, name: str, words: str) -> None:
    *others, line = warnings(name)
    assert line.startswith(f"data.validation.sources[0]: FOLDER/a-holdout {words}")
    assert "data.stage1[0]" in line
    if name.endswith("-holdout"):
        assert others[0].startswith("data.stage1[0]: the ")
        assert others[0].endswith(
            "documents that `chameleon preprocess --holdout` has held out are trained, so their "
            "loss says nothing about new documents"
        )
    else:
        assert others == []
