from pathlib import Path

import pytest

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE, Vocabulary
from megatron_chameleon.tokenizer.text.tokenizer import TEXT_MODEL_FILE, TextTokenizer
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

IMAGE_CODES = 32
CORPUS = [
    "a handwritten seven and a handwritten nine",
    "the sum of two and three is five\n    indented twice as far as two",
] * 30


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path) -> Path:
    return tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer.load(folder)


def test_the_ids_are_laid_out_as_promised(folder: Path, tokenizer: TextTokenizer) -> None:
    vocabulary = Vocabulary.load(folder)
    assert vocabulary.size == tokenizer.size == 420
    assert vocabulary.tokens[:5] == ("<s>", "<pad>", "</s>", "<unk>", "IMGIMGAZ")
    assert vocabulary.tokens[4 + IMAGE_CODES :][:5] == (
        "<eoss>",
        "<racm3:break>",
        "<reserved08706>",
        "<image>",
        "<0x00>",
    )
    assert vocabulary.tokens[4 + IMAGE_CODES + 4 + 255] == "<0xFF>"
    assert vocabulary.code_token_ids.tolist() == list(range(4, 4 + IMAGE_CODES))


@pytest.mark.parametrize(
    "text",
    [
        "a handwritten seven",
        "  leading,  double and trailing spaces   ",
        "lines\nand\ttabs\r\n\n  indented",
        "🙂 naïve 漢字 ﷽ \u0301 \x00 \x7f",
        "",
        " ",
    ],
)
def test_text_comes_back_to_the_byte(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["<s>", "</s>", "<pad>", "<unk>", "IMGIMGAZ", "<racm3:break>"])
def test_text_cannot_spell_a_control_token(
    folder: Path, tokenizer: TextTokenizer, name: str
) -> None:
    """The corpus spells them hundreds of times, but none is learned as a piece of text."""
    first_text_id = Vocabulary.load(folder).image_placeholder + 1
    for text in (name, f"before {name} after", f"{name}{name}"):
        token_ids = tokenizer.encode(text)
        assert min(token_ids) >= first_text_id
        assert tokenizer.decode(token_ids) == text


def test_a_batch_is_each_text_alone(tokenizer: TextTokenizer) -> None:
    texts = ["a handwritten seven", "", "🙂", "\ud800 lone surrogate"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"


def test_control_and_image_tokens_are_skipped_in_decoding(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    vocabulary = Vocabulary.load(folder)
    text_ids = tokenizer.encode("two and three")
    controls = [vocabulary.bos, vocabulary.unk, vocabulary.begin_image, 4, 5, vocabulary.end_image]
    assert tokenizer.decode([*controls, *text_ids, vocabulary.eos]) == "two and three"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"420 is outside the vocabulary of 420"):
        tokenizer.decode([41, 420])


def test_digits_stay_single(tmp_path: Path) -> None:
    """4 special tokens, 36 controls, 256 bytes and 6 characters: nothing can be merged."""
    corpus = ["123 1234 12345"] * 50
    with pytest.raises(ConfigError, match=r"the most is 302"):
        train_text_tokenizer(corpus, tmp_path, vocab_size=310, image_codes=IMAGE_CODES)


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text.model: no such file. Make it with"):
        TextTokenizer.load(tmp_path)
    (tmp_path / TEXT_MODEL_FILE).write_bytes(b"no model")
    with pytest.raises(DataError, match=r"is not a sentencepiece model \(8 bytes\)"):
        TextTokenizer.load(tmp_path)


def test_a_size_below_codes_and_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"296 is too small: 32 image codes.*--vocab-size 297 "):
        train_text_tokenizer(CORPUS, tmp_path, vocab_size=296, image_codes=IMAGE_CODES)
    with pytest.raises(ConfigError, match=r"--image-codes: 0 is below 1"):
        train_text_tokenizer(CORPUS, tmp_path, vocab_size=1000, image_codes=0)


def test_a_size_below_the_characters_of_the_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"300 is too small: (\d+) ids are needed") as caught:
        train_text_tokenizer(CORPUS, tmp_path, vocab_size=300, image_codes=IMAGE_CODES)
    least = int(caught.value.remedy.split()[2])
    vocabulary = train_text_tokenizer(CORPUS, tmp_path, least, IMAGE_CODES)
    assert vocabulary.size == least


def test_a_size_beyond_the_corpus_is_refused_with_the_largest_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"50000 is more than this corpus can fill") as caught:
        train_text_tokenizer(CORPUS, tmp_path, vocab_size=50000, image_codes=IMAGE_CODES)
    assert not (tmp_path / TEXT_MODEL_FILE).exists()
    most = int(caught.value.remedy.split()[2].strip(","))
    assert train_text_tokenizer(CORPUS, tmp_path, most, IMAGE_CODES).size == most


@pytest.mark.parametrize("corpus", [[], ["", "\n \n"]])
def test_an_empty_corpus_is_refused(tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(DataError, match=r"text corpus: has no text"):
        train_text_tokenizer(corpus, tmp_path, vocab_size=400, image_codes=IMAGE_CODES)


def test_a_long_line_is_not_left_out(tmp_path: Path) -> None:
    """sentencepiece skips long lines: here all 26 letters are in one of 1.2 million characters."""
    line = "abcdefghijklmnopqrstuvwxyz " * 45000
    tokens = train_text_tokenizer([line, "0"], tmp_path, vocab_size=360, image_codes=16).tokens
    assert "z" in tokens


def test_training_again_replaces_the_tokenizer(tmp_path: Path) -> None:
    train_text_tokenizer(CORPUS, tmp_path, vocab_size=400, image_codes=16)
    train_text_tokenizer(CORPUS, tmp_path, vocab_size=410, image_codes=IMAGE_CODES)
    assert Vocabulary.load(tmp_path).tokens == tuple(TextTokenizer.load(tmp_path).tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TEXT_MODEL_FILE, VOCABULARY_FILE]


def test_other_image_codes_than_the_image_tokenizer_has_are_refused(
    new_tokenizer_folder: Path,
) -> None:
    with pytest.raises(
        ConfigError, match=r"--image-codes: 16 codes, but .*image.json has 32\. Use"
    ):
        train_text_tokenizer(CORPUS, new_tokenizer_folder, vocab_size=380, image_codes=16)
    train_text_tokenizer(CORPUS, new_tokenizer_folder, vocab_size=380, image_codes=IMAGE_CODES)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written \(File exists\). Choose another"):
        train_text_tokenizer(CORPUS, tmp_path / "file", 420, IMAGE_CODES)
