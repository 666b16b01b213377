"""The fast encoder gives the same ids as sentencepiece, or it is not used."""

import itertools
import random
import sys

import numpy as np
import pytest

from megatron_chameleon.tokenizer.text import fast as fast_text
from megatron_chameleon.tokenizer.text.fast import (
    ExactTextEncoder,
    FastTextEncoder,
    choose_text_encoder,
    make_text_encoder,
)
from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

CORPUS = [
    "a handwritten seven and 1,234.5 <b>bold</b>",
    "    indented, naïve café — 東京 🙂",
    "the sum of two and three is five",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train_text_tokenizer(CORPUS * 20, folder, vocab_size=380, image_codes=16)
    return TextTokenizer.load(folder)


def encode(encoder, texts):
    token_ids, offsets = encoder.encode(texts)
    assert offsets[0] == 0 and offsets[-1] == len(token_ids)
    return [token_ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def random_texts(tokenizer):
    rng = random.Random(0)
    words = ["<", "s", ">", "/s>", " ", "  ", "\n", "\t", "\u2581", "\0", "é", "中", "\U0001f642"]
    words += tokenizer.tokens + CORPUS
    texts = ["".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(3000)]
    return [*texts, "", "<s></s><unk><pad><image>IMGIMGAZ", "\ufffe<s>", "a\ufffe", "\ud800x"]


@pytest.mark.parametrize("encoder", [FastTextEncoder, ExactTextEncoder])
def test_ids_are_sentencepiece_s(tokenizer, encoder):
    texts = random_texts(tokenizer)
    found = encode(encoder(tokenizer), texts)
    assert found == [tokenizer.encode(text) for text in texts]
    assert all(tokenizer.is_text(token_id) for token_ids in found for token_id in token_ids)
    assert encode(encoder(tokenizer), []) == []


def test_single_texts_with_noncharacters(tokenizer):
    """Each alone: one such text sends its whole batch to sentencepiece."""
    encoder = FastTextEncoder(tokenizer)
    for text in ("<s>", "\ufffe<s>", "\ufffe", "\ud800", "IMGIMGAZ"):
        assert encode(encoder, [text]) == [tokenizer.encode(text)]


def test_fast_one_is_chosen_when_it_agrees(tokenizer):
    choice = choose_text_encoder(tokenizer, random_texts(tokenizer))
    assert (choice.name, choice.why) == ("gigatoken", "")
    assert isinstance(make_text_encoder(tokenizer, choice.name), FastTextEncoder)


def test_sentencepiece_is_chosen_when_it_does_not(tokenizer, monkeypatch):
    real = FastTextEncoder.encode

    def wrong(self, texts):
        token_ids, offsets = real(self, texts)
        token_ids = np.array(token_ids)
        token_ids[offsets[1]] += 1  # the first token of the second text
        return token_ids, offsets

    monkeypatch.setattr(FastTextEncoder, "encode", wrong)
    choice = choose_text_encoder(tokenizer, ["one", "two"])
    assert choice.name == "sentencepiece" and choice.why == "gigatoken gives other ids for 'two'"
    assert isinstance(make_text_encoder(tokenizer, choice.name), ExactTextEncoder)


def test_sentencepiece_is_chosen_when_there_is_no_other(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert choose_text_encoder(tokenizer, ["x"]).why == "gigatoken is not installed"
    monkeypatch.undo()
    monkeypatch.setattr(fast_text, "rename_control_pieces", lambda model, prefix: b"no model")
    assert choose_text_encoder(tokenizer, ["x"]).why.startswith("gigatoken cannot read the model (")
