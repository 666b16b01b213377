import json
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.vocabulary import (
    VOCABULARY_FILE,
    Vocabulary,
    control_names,
    image_code_name,
)


def our_tokens(image_codes: int, pieces: tuple[str, ...] = ("▁a", "b")) -> list[str]:
    return ["<s>", "<pad>", "</s>", "<unk>", *control_names(image_codes), *pieces]


def test_codes_are_spelled_as_in_the_released_vocabulary() -> None:
    assert [image_code_name(code) for code in (0, 1, 17, 8191)] == [
        "IMGIMGAZ",
        "IMGIMGBZ",
        "IMGIMGBHZ",
        "IMGIMGIBJBZ",
    ]


def test_ids_lie_where_the_released_vocabulary_has_them() -> None:
    vocabulary = Vocabulary.from_tokens(our_tokens(8192))
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert vocabulary.image_codes == 8192
    assert (vocabulary.end_image, vocabulary.begin_image) == (8196, 8197)
    assert vocabulary.code_token_ids[[0, 17, 8191]].tolist() == [4, 21, 8195]


def test_the_map_is_read_from_the_names_and_not_from_the_order() -> None:
    """A different layout: codes out of order, sentinels anywhere, Hugging Face's other name."""
    tokens = ["<reserved08707>", "IMGIMGCZ", "x", "IMGIMGAZ", "<eoss>", "<unk>", "</s>"]
    tokens += ["<s>", "IMGIMGBZ", "<racm3:break>", "<pad>", "<reserved08706>", "IMGIMG", "IMGIMGKZ"]
    vocabulary = Vocabulary.from_tokens(tokens)
    assert vocabulary.code_token_ids.tolist() == [3, 8, 1]
    assert vocabulary.image_placeholder == 0
    assert (vocabulary.begin_image, vocabulary.end_image, vocabulary.separator) == (9, 4, 11)
    assert vocabulary.codes_to_token_ids(np.array([[2, 0], [1, 1]])).tolist() == [[1, 3], [8, 8]]
    assert vocabulary.token_ids_to_codes(np.array([8, 1, 3], dtype=np.uint16)).tolist() == [1, 2, 0]
    assert vocabulary.is_image_code(np.array([0, 1, 2, 3, 8, 12, 13, -1, 99])).tolist() == [
        False,
        True,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_every_code_comes_back() -> None:
    vocabulary = Vocabulary.from_tokens(our_tokens(300))
    codes = np.arange(300).reshape(3, 100)
    token_ids = vocabulary.codes_to_token_ids(codes)
    assert token_ids.dtype == np.int64
    np.testing.assert_array_equal(vocabulary.token_ids_to_codes(token_ids), codes)
    assert vocabulary.codes_to_token_ids(np.array([])).shape == (0,)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_tokens(our_tokens(17, pieces=("▁ü", "\n", '"')))
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    content = json.loads((tmp_path / VOCABULARY_FILE).read_text(encoding="utf-8"))
    assert content["begin_image"] == vocabulary.begin_image and content["image_codes"] == 17
    assert [path.name for path in tmp_path.iterdir()] == [VOCABULARY_FILE]


@pytest.mark.parametrize("codes", [[0, 16], [-1]])
def test_codes_outside_the_codebook_are_refused(codes: list[int]) -> None:
    vocabulary = Vocabulary.from_tokens(our_tokens(16))
    with pytest.raises(DataError, match=rf"outside \[0, 16\), the first is {codes[-1]}\."):
        vocabulary.codes_to_token_ids(np.array(codes))


@pytest.mark.parametrize(
    ("token_id", "named"), [(20, r"20 \(<eoss>\)"), (999, "999"), (-100, "-100")]
)
def test_ids_that_are_not_codes_are_refused(token_id: int, named: str) -> None:
    vocabulary = Vocabulary.from_tokens(our_tokens(16))
    with pytest.raises(DataError, match=rf"1 of 2 ids are not image codes, the first is {named}\."):
        vocabulary.token_ids_to_codes(np.array([4, token_id]))


def test_fractions_are_not_codes() -> None:
    with pytest.raises(DataError, match=r"float64 are not integers"):
        Vocabulary.from_tokens(our_tokens(16)).codes_to_token_ids(np.array([1.5]))


def test_a_missing_special_token_is_named() -> None:
    tokens = [name for name in our_tokens(16) if name not in ("<eoss>", "<image>")]
    with pytest.raises(
        DataError, match=r"none of the 24 tokens is called <eoss>, <reserved08707>\."
    ):
        Vocabulary.from_tokens(tokens)


def test_a_gap_in_the_codes_is_named() -> None:
    tokens = [name for name in our_tokens(16) if name != image_code_name(7)]
    with pytest.raises(DataError, match=r"has 15 image codes, but IMGIMGHZ \(code 7\) is missing"):
        Vocabulary.from_tokens(tokens)
    with pytest.raises(DataError, match=r"has 0 image codes, but IMGIMGAZ \(code 0\) is missing"):
        Vocabulary.from_tokens(our_tokens(0))


def test_a_name_that_occurs_twice_is_named() -> None:
    with pytest.raises(DataError, match=r"the token 'b' occurs twice"):
        Vocabulary.from_tokens(our_tokens(16, pieces=("b", "c", "b")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "is not valid JSON"),
        ("[]", "`format` is None"),
        ('{"format": "megatron_chameleon.vocabulary/9"}', "vocabulary/9', not"),
        ('{"format": "megatron_chameleon.vocabulary/1"}', "`tokens` is not a list of names"),
    ],
)
def test_a_file_that_is_not_a_vocabulary_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / VOCABULARY_FILE).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Vocabulary.load(tmp_path)
    assert "vocabulary.json" in caught.value.where
    assert "chameleon tokenizer text" in caught.value.remedy
