"""Text-image pairs in the order of their epoch, token files as corpora, and permutations."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.data.mixture.corpus import OrderedDocuments, TokenFileCorpus, order_pair
from megatron_chameleon.data.mixture.permutation import Permutation, shuffled, uniform
from megatron_chameleon.data.token_files.reader import DOCUMENT_RECORD, open_token_file
from megatron_chameleon.errors import DataError


@pytest.fixture
def make_pair(tokenizer):
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:4], v.end_image]

    def make(*parts):
        flat = [t for part in parts for t in (image if part == "image" else part)]
        return np.array([v.bos, *flat, v.eos])

    return make


def test_pair_is_put_in_order(make_pair, tokenizer):
    text = [300, 301, 302]
    image_first, text_first = make_pair("image", text), make_pair(text, "image")
    for pair in (image_first, text_first):
        np.testing.assert_array_equal(order_pair(pair, tokenizer.vocabulary, True), image_first)
        np.testing.assert_array_equal(order_pair(pair, tokenizer.vocabulary, False), text_first)


def test_other_documents_stay_as_they_are(make_pair, tokenizer):
    text = [300, 301]
    others = [
        make_pair(text),
        make_pair("image"),
        make_pair(text, "image", text),
        make_pair("image", text, "image"),
        make_pair("image", text)[1:],
        make_pair(text, "image")[:-1],
        make_pair(text, "image")[:-3],
        make_pair(text, "image")[::-1],
    ]
    for document in others:
        for image_first in (True, False):
            result = order_pair(document, tokenizer.vocabulary, image_first)
            np.testing.assert_array_equal(result, document)


def images_first(documents, epoch, count, begin):
    lengths = np.diff(documents.corpus.starts(0, count)).tolist()
    reads = [documents.read(epoch, n, 0, length, length) for n, length in enumerate(lengths)]
    return np.array([ids[1] == begin for ids in reads])


def test_share_of_pairs_with_the_image_first(token_file, make_pair, tokenizer):
    v = tokenizer.vocabulary
    pairs = [make_pair([270 + i % 60, 271], "image") for i in range(400)]
    corpus = TokenFileCorpus(token_file(pairs))
    for share, low, high in ((0.0, 0, 0), (0.25, 0.18, 0.32), (1.0, 1, 1), (None, 0, 0)):
        documents = OrderedDocuments(corpus, v, share, (5, 0))
        # 0.07 is 3 standard deviations of a share of 0.25 among 400. The key fixes the draw.
        assert low <= images_first(documents, 0, 400, v.begin_image).mean() <= high


def test_a_pair_s_order_changes_from_epoch_to_epoch(token_file, make_pair, tokenizer):
    v = tokenizer.vocabulary
    pairs = [make_pair([270 + i, 271], "image") for i in range(40)]
    documents = OrderedDocuments(TokenFileCorpus(token_file(pairs)), v, 0.5, (5, 0))
    first = [images_first(documents, epoch, 40, v.begin_image) for epoch in (0, 1)]
    assert 5 <= (first[0] != first[1]).sum() <= 35  # half of 40 on average
    part = documents.read(0, 3, 2, 5, len(pairs[3]))
    np.testing.assert_array_equal(part, documents.read(0, 3, 0, 10, len(pairs[3]))[2:5])


def test_a_token_file_is_a_corpus(token_file, make_pair, numbered, tokenizer):
    documents = [*numbered([5, 9]), make_pair("image", [300]), *numbered([4])]
    corpus = TokenFileCorpus(token_file(documents))
    starts = np.cumsum([0, *map(len, documents)])
    np.testing.assert_array_equal(corpus.starts(0, 4), starts)
    np.testing.assert_array_equal(corpus.starts(2, 3), starts[2:4])
    expected = np.repeat(np.arange(4), np.diff(starts)).tolist()
    assert [corpus.at(token) for token in range(corpus.tokens)] == expected
    assert corpus.have_images(0, 4).tolist() == [False, False, True, False]
    assert corpus.have_images(1, 1).tolist() == []
    np.testing.assert_array_equal(corpus.read(2, 1, 4), documents[2][1:4])


def test_positions_that_do_not_follow_from_the_lengths(token_file, numbered, tokenizer):
    file = token_file(numbered([5, 9, 4]))
    with Path(f"{file.prefix}.idx").open("r+b") as index:
        index.seek(34 + 3 * 4 + 8)  # the second document's byte
        index.write((12).to_bytes(8, "little"))
    corpus = TokenFileCorpus(type(file)(file.prefix, file.info))
    with pytest.raises(DataError, match=r"tokens\.idx: the positions of documents 0 to 2 do not"):
        corpus.starts(0, 3)


def test_a_token_file_of_a_billion_documents_opens_at_once(token_file, numbered, tokenizer):
    """With sparse files: of the lengths and positions only the last ones are read."""
    path = Path(token_file(numbered([5, 9, 4])).prefix)
    documents, tokens = 10**9, 10**11
    index = path.with_suffix(".idx")
    head = index.read_bytes()[:18] + struct.pack("<QQ", documents, documents + 1)
    with index.open("wb") as file:
        file.write(head)
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", 100))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", 2 * (tokens - 100)))
        file.seek(34 + 12 * documents + 8 * documents)
        file.write(struct.pack("<q", documents))
    with path.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * tokens)
    with path.with_suffix(".documents").open("wb") as file:
        file.truncate(documents * DOCUMENT_RECORD.itemsize)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar |= {"documents": documents, "tokens": tokens, "bin_bytes": 2 * tokens}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    tracemalloc.start()
    corpus = TokenFileCorpus(open_token_file(path, tokenizer))
    assert corpus.at(tokens - 1) == documents - 1
    assert corpus.at(tokens - 101) == documents - 2
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_has_each_place_once(size):
    places = Permutation(size, 7, 1)(np.arange(size))
    assert sorted(places.tolist()) == list(range(size))


def test_a_permutation_depends_on_its_key_and_mixes():
    places = [Permutation(10_000, 7, key)(np.arange(10_000)) for key in (1, 2)]
    for found in places:
        # neighbours land anywhere: a mean distance of a third of the size
        assert 3000 < np.abs(np.diff(found)).mean() < 3700
    assert (places[0] == places[1]).mean() < 0.01


def test_large_permutations_cost_nothing():
    assert Permutation(10**15, 1)(np.array([0, 10**15 - 1])).tolist() == LARGE


def test_random_numbers_are_the_same_in_every_version():
    """Golden values: if they change, old runs cannot be continued."""
    assert Permutation(10, 5, 2)(np.arange(10)).tolist() == TEN
    assert shuffled(8, 5, 0, 1).tolist() == EIGHT
    assert uniform(5, 0, 1, 2) == 0.7109656225500515


LARGE = [876838595517234, 251786046555338]
TEN = [3, 4, 8, 2, 1, 0, 9, 6, 7, 5]
EIGHT = [7, 1, 3, 6, 2, 0, 5, 4]
