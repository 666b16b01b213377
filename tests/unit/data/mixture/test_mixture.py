"""The mixture: exact shares and stages, limits on epochs, no cost that grows with the corpus."""

import random
import time
import tracemalloc

import numpy as np
import pytest

from megatron_chameleon.data.mixture.mixture import (
    ExhaustedError,
    Mixture,
    MixtureWeights,
    SourceWeight,
)
from megatron_chameleon.data.mixture.stream import Cursor, SourceStream
from megatron_chameleon.errors import DataError
from synthetic_corpus import VOCABULARY, EndlessCorpus, ListCorpus, document, image, words

SEQ_LENGTH = 4096
BATCH = 2048


def cursor(corpus, stream=0, seq_length=SEQ_LENGTH, isolated=False, **sizes):
    return Cursor(SourceStream(corpus, VOCABULARY, 1, stream, seq_length, isolated, **sizes))


def web(documents=10**9):
    """Texts of 40 to 20,000 tokens."""
    draw = np.random.default_rng(1)
    return EndlessCorpus(draw.integers(40, 200, 1000) ** draw.integers(1, 3, 1000), documents)


def pairs(documents=10**9):
    return EndlessCorpus(
        np.random.default_rng(2).integers(1050, 1100, 1000), documents, images=True
    )


def taken(mixture, phase, block):
    """The tokens that a block takes from each source, by key."""
    packed = mixture.block(phase, block)
    totals = np.bincount(
        packed.source, weights=packed.parts.tokens, minlength=len(mixture.source_names)
    )
    return dict(zip(mixture.source_names, totals.astype(int).tolist(), strict=True))


def test_a_million_steps_switch_at_the_exact_sample_and_keep_the_weights():
    """The paper's two stages over 10^6 steps of 2048 sequences, without reading a token."""
    steps, border = 10**6, 800_000 * BATCH
    corpora = {"text": web(), "pairs": pairs(), "new text": web(), "new pairs": pairs()}
    cursors = {key: cursor(corpus, n) for n, (key, corpus) in enumerate(corpora.items())}
    first = SourceWeight("text", 2.9), SourceWeight("pairs", 1.5)
    second = SourceWeight("new text", 2.9), SourceWeight("new pairs", 1.5)
    mixture = Mixture(MixtureWeights(first, second, 0.5, border), cursors, 1, SEQ_LENGTH)
    stages = [mixture.locate(step * BATCH).phase.stage for step in range(0, steps, 50)]
    assert stages == [1] * (800_000 // 50) + [2] * (200_000 // 50)
    one, two = mixture.phases(steps * BATCH)
    assert (one.first_sample, one.end_sample) == (0, border)
    assert (two.first_sample, two.end_sample) == (border, None)
    assert mixture.locate(border - 1).phase is one and mixture.locate(border).phase is two

    blocks = border // mixture.block_sequences
    whole = sum(one.position(key, blocks) for key in ("text", "pairs"))
    assert one.position("text", blocks) == pytest.approx(whole * 2.9 / 4.4, abs=2)
    assert whole >= 0.99 * border * SEQ_LENGTH  # padding
    blocks = (steps * BATCH - border) // mixture.block_sequences
    amounts = {key: two.position(key, blocks) for key in cursors}
    whole = sum(amounts.values())
    for key, share in zip(cursors, (1.45, 0.75, 1.45, 0.75), strict=True):
        assert amounts[key] == pytest.approx(whole * share / 4.4, abs=2)
    # Each source continues where stage 1 left it: in the same epoch, at the same place.
    for key in ("text", "pairs"):
        used = one.position(key, border // mixture.block_sequences)
        assert two.cursors[key].base == used
        assert two.cursors["new text"].base == 0


def test_the_shares_of_a_block_are_exact_where_text_is_cut_anywhere():
    cursors = {"a": cursor(web(10**6), 1), "b": cursor(web(10**6), 2)}
    mixture = Mixture(
        MixtureWeights((SourceWeight("a", 3.0), SourceWeight("b", 1.0))), cursors, 1, SEQ_LENGTH
    )
    phase = mixture.locate(0).phase
    for block in (0, 1, 77):
        found = taken(mixture, phase, block)
        capacity = mixture.block_sequences * SEQ_LENGTH
        assert found == {"a": capacity * 3 // 4, "b": capacity // 4}  # and no padding at all


def test_sources_are_mixed_within_a_block():
    """Any 100 consecutive sequences have the shares, give or take a few sequences."""
    cursors = {"a": cursor(web(10**6), 1), "b": cursor(pairs(10**6), 2)}
    mixture = Mixture(
        MixtureWeights((SourceWeight("a", 3.0), SourceWeight("b", 1.0))), cursors, 1, SEQ_LENGTH
    )
    packed = mixture.block(mixture.locate(0).phase, 0)
    for first in range(0, 1900, 50):
        here = (packed.sequence >= first) & (packed.sequence < first + 100)
        share = packed.parts.tokens[here & (packed.source == 1)].sum() / (100 * SEQ_LENGTH)
        assert 0.15 < share < 0.35


def test_any_order_of_access_gives_the_same():
    def make():
        cursors = {"a": cursor(web(10**6), 1), "b": cursor(pairs(10**6), 2)}
        weights = MixtureWeights((SourceWeight("a", 3.0),), (SourceWeight("b", 1.0),), 0.5, 5000)
        return Mixture(weights, cursors, 1, SEQ_LENGTH)

    def content(mixture, sample):
        parts = mixture.sequence(sample).parts
        return [parts.epoch.tolist(), parts.document.tolist(), parts.start.tolist()]

    samples = [0, 1, 2047, 2048, 4999, 5000, 5001, 9000]
    mixture = make()
    forwards = {sample: content(mixture, sample) for sample in samples}
    random.Random(1).shuffle(samples)
    for sample in samples:
        assert content(make(), sample) == forwards[sample]


def test_seed_and_stream_change_the_order():
    corpus = web(10**6)
    streams = [
        SourceStream(corpus, VOCABULARY, *key, SEQ_LENGTH) for key in ((1, 1), (1, 2), (2, 1))
    ]
    firsts = [s.between(s.cut(0), s.cut(100_000)).document.tolist() for s in streams]
    assert len({str(first) for first in firsts}) == 3


def test_a_billion_documents_start_at_once():
    """Less than 5 s and 500 MiB from nothing to the first, a middle and the last sample."""
    tracemalloc.start()
    start = time.process_time()
    for isolated in (False, True):
        cursors = {"t": cursor(web(), 1, isolated=isolated), "p": cursor(pairs(), 2)}
        weights = MixtureWeights((SourceWeight("t", 2.9), SourceWeight("p", 1.5)))
        mixture = Mixture(weights, cursors, 1, SEQ_LENGTH)
        samples = 2 * web().tokens // SEQ_LENGTH
        for sample in (0, samples // 2, samples):
            assert mixture.sequence(sample).parts.tokens.sum() > 2000
        assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 500 * 2**20
    tracemalloc.stop()


def small(count, length=10, stream=0):
    corpus = ListCorpus(
        [document(words(length - 2, np.random.default_rng(n))) for n in range(count)]
    )
    return cursor(corpus, stream, seq_length=50)


def test_an_exhausted_source_leaves_its_share_to_the_others():
    cursors = {"a": small(300, stream=1), "b": small(500, stream=2)}
    weights = MixtureWeights((SourceWeight("a", 1.0, epochs=2), SourceWeight("b", 1.0)))
    mixture = Mixture(weights, cursors, 1, 50, 0, 64)
    totals = dict.fromkeys(cursors, 0)
    for phase in mixture.phases(2000):
        blocks = 3 if phase.end_sample is None else (phase.end_sample - phase.first_sample) // 64
        for block in range(blocks):
            found = taken(mixture, phase, block)
            assert sum(found.values()) == 64 * 50  # full to the end
            totals = {key: totals[key] + found[key] for key in totals}
    assert totals["a"] == 2 * 300 * 10
    assert [set(phase.rates) for phase in mixture.phases(2000)] == [{"a", "b"}, {"a", "b"}, {"b"}]


def test_samples_end_with_the_last_source():
    cursors = {"a": small(301, stream=1), "b": small(500, stream=2)}
    weights = MixtureWeights((SourceWeight("a", 1.0, epochs=1), SourceWeight("b", 1.0, epochs=3)))
    mixture = Mixture(weights, cursors, 1, 50, 0, 64)
    with pytest.raises(ExhaustedError) as caught:
        mixture.locate(10**6)
    samples = caught.value.samples
    assert samples == -(-(301 + 1500) * 10 // 50)
    tokens = sum(int(mixture.sequence(n).parts.tokens.sum()) for n in range(samples))
    assert tokens == (301 + 1500) * 10
    with pytest.raises(ExhaustedError):
        mixture.locate(samples)


def test_an_exhausted_text_that_filled_the_room_beside_images():
    """When the text is used up, a block takes fewer pairs, and still holds them."""
    draw = np.random.default_rng(1)
    captions = ListCorpus([document(image(16, draw), words(2, draw)) for _ in range(500)])
    cursors = {"text": small(100, stream=1), "pairs": cursor(captions, 2, seq_length=50)}
    weights = MixtureWeights((SourceWeight("text", 1.0, epochs=1), SourceWeight("pairs", 1.0)))
    mixture = Mixture(weights, cursors, 1, 50, 0, 64)
    totals = [taken(mixture, phase, 0) for phase in mixture.phases(1000)]
    assert sum(found["text"] for found in totals) == 1000
    assert totals[-1]["pairs"] > 0


def test_images_that_do_not_fit_are_named():
    """Texts first, then pairs, in chunks of one document: a block without text is too full."""
    draw = np.random.default_rng(1)
    documents = [document(words(40, draw))] * 12_000
    documents += [document(image(16, draw), words(2, draw)) for _ in range(4000)]
    stream = SourceStream(
        ListCorpus(documents), VOCABULARY, 1, 0, 50, chunk_tokens=60_000, window_chunks=1
    )
    mixture = Mixture(
        MixtureWeights((SourceWeight("a", 1.0),)), {"a": Cursor(stream)}, 1, 50, 0, 64
    )
    phase = mixture.locate(0).phase
    message = (
        r"data: the \d+ tokens of a for the samples \d+ to \d+ do not fit into them, because images"
    )
    with pytest.raises(DataError, match=message):
        for block in range(300):
            mixture.block(phase, block)
    # With a larger reserve the run continues from there.
    weights = MixtureWeights((SourceWeight("a", 1.0),), reserve=0.3)
    more = Mixture(weights, mixture.cursors_at(block * 64), 1, 50, block * 64, 64)
    phase = more.locate(block * 64).phase
    for further in range(50):
        more.block(phase, further)


def test_an_image_longer_than_a_sequence():
    draw = np.random.default_rng(1)
    corpus = ListCorpus([document(image(60, draw), words(5, draw))] * 30, "files/long")
    mixture = Mixture(
        MixtureWeights((SourceWeight("a", 1.0),)), {"a": cursor(corpus, 1, 50)}, 1, 50, 0, 64
    )
    with pytest.raises(
        DataError, match=r"files/long: document .* is longer than model\.seq_length 50"
    ):
        mixture.sequence(0)
