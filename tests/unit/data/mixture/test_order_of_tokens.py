"""Random corpora: every token once per epoch and whole images, whatever the blocks and edits."""

from collections import defaultdict

import numpy as np
import pytest

from megatron_chameleon.data.mixture.corpus import image_spans
from megatron_chameleon.data.mixture.mixture import Mixture, MixtureWeights, SourceWeight
from megatron_chameleon.data.mixture.stream import Cursor, SourceStream
from synthetic_corpus import VOCABULARY, ListCorpus, document, image, words


def random_corpus(draw, kind, seq_length):
    codes = int(draw.integers(2, seq_length // 3))
    documents = []
    for _ in range(int(draw.integers(1, 60))):
        text = words(int(draw.integers(0, 2 * seq_length)) // int(draw.integers(1, 9)), draw)
        if kind == "text":
            parts = [text * int(draw.integers(1, 4))]
        elif kind == "pairs":
            parts = [image(codes, draw), text[:9] or words(1, draw)]
        else:
            parts = [
                words(int(draw.integers(0, 20)), draw)
                if draw.random() < 0.5
                else image(codes, draw)
                for _ in range(int(draw.integers(1, 9)))
            ]
        documents.append(document(*(parts if draw.random() < 0.5 else parts[::-1])))
    return ListCorpus(documents, kind)


def random_run(seed, isolated):
    """Sources of random documents, in streams of tiny chunks and windows."""
    draw = np.random.default_rng(seed)
    seq_length = int(draw.integers(30, 80))
    kinds = draw.choice(["text", "pairs", "interleaved"], int(draw.integers(1, 4)))
    cursors = {}
    for number, kind in enumerate(kinds):
        corpus = random_corpus(draw, kind, seq_length)
        share = [None, 0.5][int(draw.integers(2))]
        sizes = (int(draw.integers(1, 400)), int(draw.integers(1, 4)))
        stream = SourceStream(corpus, VOCABULARY, seed, number, seq_length, isolated, share, *sizes)
        cursors[f"{kind}{number}"] = Cursor(stream)
    return draw, seq_length, cursors


def weights_of(draw, cursors):
    return MixtureWeights(
        tuple(SourceWeight(key, float(draw.uniform(0.2, 1))) for key in cursors), reserve=0.1
    )


def check_sequence(packed, cursors, seq_length):
    """Check that images are whole, and documents that need not be cut."""
    streams = [cursor.stream for cursor in cursors.values()]
    assert packed.parts.tokens.sum() <= seq_length
    parts = packed.parts
    for i in range(len(parts)):
        stream = streams[packed.source[i]]
        epoch, number = int(parts.epoch[i]), int(parts.document[i])
        spans = stream.documents.spans(epoch, number)
        for border in (int(parts.start[i]), int(parts.stop[i])):
            assert not ((spans[:, 0] < border) & (border < spans[:, 1])).any()


def read_all(mixture, first, last, found):
    """Add what the samples ``first`` to ``last`` - 1 hold of each source and epoch to ``found``."""
    for sample in range(first, last):
        packed = mixture.sequence(sample)
        check_sequence(packed, mixture.cursors, mixture.seq_length)
        columns = (packed.parts.epoch, packed.parts.document, packed.parts.start)
        for number, stop, *key in zip(packed.source, packed.parts.stop, *columns, strict=True):
            epoch, document_number, start = (int(value) for value in key)
            name = mixture.source_names[number]
            found[name, epoch].append((document_number, start, int(stop)))


def complete(found, cursors):
    """Add the rest of the epochs that have begun, from where the sources stand."""
    for key, cursor in cursors.items():
        epochs = (
            max([cursor.base // cursor.stream.corpus.tokens, *(e for n, e in found if n == key)])
            + 1
        )
        rest = cursor.parts(0, cursor.tokens_left(epochs))
        for row in zip(rest.epoch, rest.document, rest.start, rest.stop, strict=True):
            epoch, *part = (int(value) for value in row)
            found[key, epoch].append(tuple(part))


def assert_whole_epochs(found, cursors):
    """Check that each epoch has every token of every document exactly once."""
    for (key, _), parts in found.items():
        expected = {n: len(d) for n, d in enumerate(cursors[key].stream.corpus.content)}
        ends = dict.fromkeys(expected, 0)
        for number, start, stop in sorted(parts):
            assert start == ends[number] and stop > start
            ends[number] = stop
        assert ends == expected


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_every_token_once_an_epoch_and_images_whole(seed, isolated):
    draw, seq_length, cursors = random_run(seed, isolated)
    mixture = Mixture(
        weights_of(draw, cursors), cursors, seed, seq_length, 0, int(draw.integers(40, 90))
    )
    found = defaultdict(list)
    samples = 0
    while min(len([e for n, e in found if n == key]) for key in cursors) < 4:
        read_all(mixture, samples, samples + 50, found)
        samples += 50
    complete(found, mixture.cursors_at(samples))
    assert_whole_epochs(found, cursors)


@pytest.mark.parametrize("seed", range(100, 115))
def test_nothing_is_lost_by_stages_and_edits_in_the_middle_of_blocks(seed):
    """Five mixtures one after the other, each with a second stage that may begin at any sample."""
    draw, seq_length, cursors = random_run(seed, isolated=bool(seed % 2))
    found, first, all_cursors = defaultdict(list), 0, dict(cursors)
    for _ in range(5):
        weights = weights_of(draw, all_cursors)
        if len(cursors) > 1:
            stages = weights.stage1[:1], weights.stage1[1:]
            border = first + int(draw.integers(0, 150))
            weights = MixtureWeights(*stages, 0.5, border, reserve=0.1)
        mixture = Mixture(weights, all_cursors, seed, seq_length, first, int(draw.integers(40, 90)))
        last = first + int(draw.integers(1, 300))
        read_all(mixture, first, last, found)
        first, all_cursors = last, mixture.cursors_at(last)
    complete(found, all_cursors)
    assert_whole_epochs(found, cursors)


def test_what_fits_into_a_sequence_is_not_cut_when_isolated():
    draw = np.random.default_rng(3)
    texts = ListCorpus([document(words(int(n), draw)) for n in draw.integers(1, 60, 400)])
    pairs = ListCorpus([document(image(16, draw), words(int(n), draw)) for n in [1, 3, 9] * 90])
    cursors = {
        name: Cursor(SourceStream(corpus, VOCABULARY, 1, n, 64, True))
        for n, (name, corpus) in enumerate({"texts": texts, "pairs": pairs}.items())
    }
    shares = MixtureWeights((SourceWeight("texts", 1.0), SourceWeight("pairs", 1.0)))
    mixture = Mixture(shares, cursors, 1, 64, 0, 200)
    for sample in range(600):
        parts = mixture.sequence(sample).parts
        assert (parts.tokens == parts.length).all()


def test_spans_of_broken_images_end_somewhere():
    v = VOCABULARY
    tokens = np.array([v.begin_image, 5, v.begin_image, 5, v.end_image, 300, v.begin_image, 5])
    assert image_spans(tokens, v).tolist() == [[0, 2], [2, 5], [6, 8]]
