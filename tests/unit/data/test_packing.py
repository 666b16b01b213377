"""The stream of a source: nothing lost, nothing twice, the same from any side."""

import numpy as np
import pytest

from megatron_chameleon.data.packing import DocumentStream, order_pair, uniform

LENGTHS = [7, 2, 31, 12, 5, 64, 3, 9]


@pytest.fixture
def stream_of(token_file, tokenizer):
    def make(documents, seq_length=10, seed=5, source=0, image_first=None, name="tokens"):
        file = token_file(documents, name)
        return DocumentStream(file, tokenizer.vocabulary, seed, source, seq_length, image_first)

    return make


def stream_tokens(stream, windows):
    """The stream's tokens, after checking that each window starts with the last token before it."""
    tokens = [stream.window(0)]
    for k in range(1, windows):
        window = stream.window(k)
        assert window[0] == tokens[-1][-1]
        tokens.append(window[1:])
    return np.concatenate(tokens)


def split_documents(tokens, eos):
    return np.split(tokens, np.flatnonzero(tokens == eos) + 1)


@pytest.mark.parametrize("seq_length", [1, 10, 133, 500])  # up to several epochs a window
def test_each_epoch_has_each_document_once_in_another_order(
    stream_of, numbered, tokenizer, seq_length
):
    documents = numbered(LENGTHS)
    stream = stream_of(documents, seq_length)
    epochs, total = 4, sum(LENGTHS)
    tokens = stream_tokens(stream, -(-epochs * total // seq_length))[: epochs * total]
    orders = []
    for epoch in range(epochs):
        found = split_documents(
            tokens[epoch * total : (epoch + 1) * total], tokenizer.vocabulary.eos
        )
        assert len(found.pop()) == 0
        orders.append([doc.tolist() for doc in found])
        assert sorted(orders[-1]) == sorted(doc.tolist() for doc in documents)
    assert len({str(order) for order in orders}) == epochs


def test_window_depends_on_its_index_only(stream_of, numbered):
    documents = numbered(LENGTHS)
    first, second = stream_of(documents, name="a"), stream_of(documents, name="b")
    indices = [40, 3, 0, 3, 99, 40, 1]
    forwards = {k: first.window(k) for k in sorted(indices)}
    for k in indices:
        np.testing.assert_array_equal(second.window(k), forwards[k])
        assert forwards[k].dtype == np.int64 and forwards[k].shape == (11,)


def test_seed_and_source_change_the_order(stream_of, numbered):
    documents = numbered(LENGTHS)
    streams = [
        stream_of(documents, 133, seed, source, name=f"{seed}-{source}")
        for seed, source in ((5, 0), (5, 1), (6, 0))
    ]
    assert len({str(stream.window(0)) for stream in streams}) == 3


def test_order_is_the_same_in_every_version(stream_of, numbered):
    """Golden values: a change here means that no old run can be continued."""
    stream = stream_of(numbered([3] * 8), seq_length=23)
    assert stream._epoch(0).order.tolist() == ORDER_OF_EPOCH_0
    assert stream._epoch(1).order.tolist() == ORDER_OF_EPOCH_1
    assert uniform(5, 0, 1, 2) == UNIFORM_5_0_1_2


ORDER_OF_EPOCH_0 = [7, 4, 3, 5, 6, 2, 0, 1]
ORDER_OF_EPOCH_1 = [7, 1, 3, 6, 2, 0, 5, 4]
UNIFORM_5_0_1_2 = 0.7109656225500515


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


def first_tokens(stream, windows):
    """The token after ``<s>`` of each document, where a window is one document and one token."""
    return np.array([stream.window(k)[1] for k in windows])


def test_share_of_pairs_with_the_image_first(stream_of, make_pair, tokenizer):
    pairs = [make_pair([270 + i % 60, 271], "image") for i in range(200)]
    length = len(pairs[0])
    begin = tokenizer.vocabulary.begin_image
    for share, low, high in ((0.0, 0, 0), (0.25, 0.18, 0.32), (1.0, 1, 1)):
        stream = stream_of(pairs, length, image_first=share, name=f"pairs-{share}")
        image_first = first_tokens(stream, range(400)) == begin
        # 0.07 is 3 standard deviations of a share of 0.25 among 400; the seed fixes the draw
        assert low <= image_first.mean() <= high
    unset = stream_of(pairs, length, image_first=None, name="unset")
    assert not (first_tokens(unset, range(400)) == begin).any()


def test_a_pair_s_order_changes_from_epoch_to_epoch(stream_of, make_pair, tokenizer):
    pairs = [make_pair([270 + i, 271], "image") for i in range(40)]
    length = len(pairs[0])
    stream = stream_of(pairs, length, image_first=0.5)
    first_of = []
    for epoch in (0, 1):
        order = stream._epoch(epoch).order
        windows = range(epoch * len(pairs), (epoch + 1) * len(pairs))
        first = first_tokens(stream, windows) == tokenizer.vocabulary.begin_image
        first_of.append({int(doc): bool(f) for doc, f in zip(order, first, strict=True)})
    changed = sum(first_of[0][doc] != first_of[1][doc] for doc in first_of[0])
    assert 5 <= changed <= 35  # half of 40 on average


def test_windows_that_cut_reordered_pairs_still_join(stream_of, make_pair, tokenizer):
    pairs = [make_pair([270 + i, 271, 272], "image") for i in range(30)]
    stream = stream_of(pairs, seq_length=7, image_first=0.5)
    length = len(pairs[0])
    tokens = stream_tokens(stream, -(-2 * 30 * length // 7))[: 2 * 30 * length]
    found = split_documents(tokens, tokenizer.vocabulary.eos)
    assert len(found.pop()) == 0
    text_first = [order_pair(doc, tokenizer.vocabulary, False).tolist() for doc in found]
    assert sorted(text_first) == sorted(2 * [pair.tolist() for pair in pairs])
