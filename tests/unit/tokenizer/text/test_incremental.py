"""Decoding one token after the other gives what decoding all of them at once gives."""

import random
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_chameleon.tokenizer.text.incremental import IncrementalDecoder
from megatron_chameleon.tokenizer.text.tokenizer import SPACE, TextTokenizer

TEXTS = (
    "a handwritten seven\n    indented",
    " Zwölf Boxkämpfer jagen Viktor ",
    "数字は三です。 四個",
    "יש כאן שלוש ספרות",
    "تلك ثلاثة أرقام",
    "यह तीन है",
    "여기에 세 개",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \x00\x7f\ufffd\U0010ffff",
)


@pytest.fixture(scope="module", params=["ours", "with a space before the text", "trimmed"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> TextTokenizer:
    """Ours, and the ways in which other people's sentencepiece models treat spaces."""
    model = sentencepiece_model_pb2.ModelProto.FromString(
        TextTokenizer.load(tokenizer_folder).model
    )
    model.normalizer_spec.add_dummy_prefix = request.param != "ours"
    model.normalizer_spec.remove_extra_whitespaces = request.param == "trimmed"
    return TextTokenizer(model.SerializeToString())


def test_texts_of_many_scripts(tokenizer: TextTokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        decoder = IncrementalDecoder(tokenizer)
        parts = [decoder.feed(token_id) for token_id in ids]
        assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(parts).replace("\x7f\ufffd", ""), "a character was split"


def test_any_tokens(tokenizer: TextTokenizer) -> None:
    """Also bytes that are no text, control tokens between them, and spaces at the beginning."""
    rng = random.Random(5)
    every = range(tokenizer.size)
    spaces = [i for i in every if tokenizer.tokens[i].startswith(SPACE)]
    high = [i for i in every if tokenizer.is_byte(i) and tokenizer.byte(i) >= b"\x80"]
    assert len(spaces) > 3 and len(high) == 128
    for _ in range(3000):
        pools = [every, spaces, high]
        ids = [
            rng.choice(pools[rng.choices(range(3), (1, 1, 3))[0]])
            for _ in range(rng.randrange(1, 12))
        ]
        decoder, given = IncrementalDecoder(tokenizer), ""
        for count, token_id in enumerate(ids, 1):
            given += decoder.feed(token_id)
            assert tokenizer.decode(ids[:count]).startswith(given)
        assert given + decoder.finish() == tokenizer.decode(ids)


def test_the_last_byte_brings_the_character(tokenizer: TextTokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    whole = [tokenizer.encode("a")[-1], *tokenizer.encode("x漢")[-3:]]
    assert [decoder.feed(token_id) for token_id in whole] == ["a", "", "", "漢"]
    assert decoder.finish() == ""
