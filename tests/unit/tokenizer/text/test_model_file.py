"""A sentencepiece model made from tokenizer.json gives the same ids, or is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.tokenizer.huggingface import fast_tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer
from megatron_chameleon.tokenizer.text.model_file import (
    HARD_TEXTS,
    build_sentencepiece_model,
    rename_control_pieces,
    sentencepiece_from_huggingface,
)
from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer


@pytest.fixture
def exported(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    path = tmp_path / "text_tokenizer.json"
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert isinstance(tokenizer.image, ImageTokenizer)
    fast_tokenizer(tokenizer).backend_tokenizer.save(str(path))
    return path


def test_ids_and_kinds_come_back(exported: Path, tiny_tokenizer: Path) -> None:
    old = TextTokenizer.load(tiny_tokenizer)
    new = TextTokenizer(sentencepiece_from_huggingface(exported))
    assert new.tokens == old.tokens
    assert Vocabulary.from_tokens(new.tokens) == Vocabulary.load(tiny_tokenizer)
    for text in HARD_TEXTS:
        assert new.encode(text) == old.encode(text)
        assert new.decode(new.encode(text)) == text.replace("▁", " ")
    kinds = [(old.is_text(i), old.is_byte(i)) for i in range(old.size)]
    assert [(new.is_text(i), new.is_byte(i)) for i in range(new.size)] == kinds


def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "<pad>", *alphabet])}
    byte_level = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"sentencepiece would give other ids for 'The quick"):
        sentencepiece_from_huggingface(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="WordPiece"), "is a WordPiece, not a BPE"),
        (lambda c: c["model"]["vocab"].pop("<s>"), "ids have gaps"),
        (lambda c: c.pop("model"), r"is not a valid tokenizer\.json"),
    ],
)
def test_other_files_are_refused(exported: Path, change, message: str) -> None:
    content = json.loads(exported.read_text())
    change(content)
    exported.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        sentencepiece_from_huggingface(exported)


def test_a_prefix_is_added_where_it_is_asked_for() -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "▁a"]
    plain, prefixed = (
        TextTokenizer(
            build_sentencepiece_model(
                names, {"▁a": 0}, {"<s>", "<pad>", "</s>"}, byte_fallback=False, add_prefix=add
            )
        )
        for add in (False, True)
    )
    assert (plain.encode("a"), prefixed.encode("a")) == ([5], [6])


def test_the_bytes_of_a_model_stay_the_same() -> None:
    """Checkpoints and token files name a tokenizer by a digest of its bytes."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<0x0A>", "▁", "é", "a", "▁a"]
    model = build_sentencepiece_model(names, {"▁a": 0}, {"<s>", "<pad>", "</s>"})
    assert len(model) == 200
    assert hashlib.sha256(model).hexdigest() == (
        "fbafdbf715c8145d3a7d18fbf8ba708d6a023da10f838ed2507bdcabfacacd36"
    )


def test_only_control_pieces_are_renamed(tiny_tokenizer: Path) -> None:
    old = (tiny_tokenizer / "text.model").read_bytes()
    assert rename_control_pieces(old, "") == old  # what sentencepiece wrote, to the byte
    before, after = TextTokenizer(old), TextTokenizer(rename_control_pieces(old, "\ufffe"))
    for token_id, (name, new_name) in enumerate(zip(before.tokens, after.tokens, strict=True)):
        is_control = not before.is_text(token_id) and name != "<unk>"
        assert new_name == (f"\ufffe{name}" if is_control else name)
