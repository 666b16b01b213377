"""Pairs of answers in token files: one document of two conversations each."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.data.token_files.reader import open_token_file
from megatron_chameleon.tokenizer.folder import load_tokenizer
from tests.support.run_command import run_chameleon
from tests.support.tiny_model import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_pair_is_one_document_of_two_conversations(tmp_path: Path, tokenizer: Path) -> None:
    records = [
        {"prompt": "a", "chosen": "one", "rejected": "two"},
        {"prompt": "a", "chosen": "one", "rejected": [{"type": "image", "image": "missing.png"}]},
        {"prompt": "a", "chosen": "one", "rejected": "one"},
        {"prompt": "a", "answer": "one"},
        {"prompt": "a", "answer": "two"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prefix = tmp_path / "tokens"
    done = run_chameleon("preprocess", path, "--tokenizer", tokenizer, "--output", prefix)
    assert done.returncode == 0, done.stderr
    file = open_token_file(prefix, load_tokenizer(tokenizer, images=False))
    pair, one, two = (file.read(document).tolist() for document in range(3))
    assert pair == one + two
    # the spans of both answers, as in the conversations alone
    assert file.answer_spans(0).tolist() == [
        file.answer_spans(1)[0].tolist(),
        (file.answer_spans(2)[0] + [len(one), 0]).tolist(),
    ]
    assert file.info.total("pairs") == 1 and sum(file.info.dropped.values()) == 2
