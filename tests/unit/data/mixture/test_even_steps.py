"""Even steps: no step of a run is nearly empty, wherever blocks, stages, sources or the run end."""

from collections import Counter

import numpy as np
import pytest

from megatron_chameleon.data.mixture.mixture import (
    ExhaustedError,
    Mixture,
    MixtureWeights,
    SourceWeight,
)
from megatron_chameleon.data.mixture.stream import Cursor, SourceStream
from synthetic_corpus import VOCABULARY, ListCorpus, document, image, words

SEQ_LENGTH = 64


class Conversations(ListCorpus):
    """Documents that are never cut, of which those above a sequence are left out."""

    longest_conversation = 10**6

    def stay_whole(self, first, stop):
        return np.ones(stop - first, dtype=bool)

    are_conversations = stay_whole


def texts(draw, lowest=2, highest=11, count=500):
    return [document(words(int(n), draw)) for n in draw.integers(lowest, highest, count)]


def pairs(draw):
    return [document(image(5, draw), words(int(n), draw)) for n in draw.integers(1, 3, 400)]


CORPORA = {
    "texts": lambda draw: ListCorpus(texts(draw)),
    "texts of one length": lambda draw: ListCorpus(texts(draw, 8, 9)),
    "pairs": lambda draw: ListCorpus(pairs(draw)),
    "interleaved": lambda draw: ListCorpus(pairs(draw) + texts(draw)),
    "conversations": lambda draw: Conversations(texts(draw)),
    "texts and long ones": lambda draw: ListCorpus(texts(draw) + texts(draw, 70, 300, 9)),
}


def cursors_of(kinds, seed, isolated):
    draw = np.random.default_rng(seed)
    return {
        f"{kind} {n}": Cursor(
            SourceStream(CORPORA[kind](draw), VOCABULARY, seed, n, SEQ_LENGTH, isolated)
        )
        for n, kind in enumerate(kinds)
    }


def random_mixture(seed, **values):
    """Sources of short documents with other weights, stages, limits and blocks for each seed."""
    draw = np.random.default_rng(seed)
    kinds = draw.choice(list(CORPORA), int(draw.integers(1, 4)))
    cursors = cursors_of(kinds, seed, isolated=bool(seed % 2))
    sources = [
        SourceWeight(key, float(draw.uniform(0.2, 1)), [None, 1, 3][int(draw.integers(3))])
        for key in cursors
    ]
    border = int(draw.integers(0, 400)) if len(sources) > 1 and draw.random() < 0.5 else 0
    first, second = (sources[:1], sources[1:]) if border else (sources, [])
    weights = MixtureWeights(tuple(first), tuple(second), 0.5, border)
    block = int(draw.choice([64, 100, 256]))
    return Mixture(weights, cursors, seed, SEQ_LENGTH, 0, block, **values)


def fills_of(mixture, samples):
    """The share of each sequence that is filled, up to the end of the run."""
    found = []
    try:
        for sample in range(samples):
            found.append(mixture.sequence(sample).parts.tokens.sum() / SEQ_LENGTH)
    except ExhaustedError as error:
        assert error.samples == len(found)
        return np.array(found), True
    return np.array(found), False


def padding(fills, size):
    """The share of padding in each whole step of ``size`` sequences."""
    return 1 - fills[: len(fills) // size * size].reshape(-1, size).mean(axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_no_step_is_nearly_empty(seed):
    """Not even one of a single sequence, apart from the last of the run; nor any larger one."""
    fills, ended = fills_of(random_mixture(seed), 700)
    assert padding(fills[: len(fills) - ended], 1).max(initial=0) <= 0.25
    for size in (7, 8, 300):  # a step may be larger than a block
        assert padding(fills, size).max(initial=0) <= 0.25


def test_version_1_had_nearly_empty_steps():
    """What the test above would find without levelling and permutation."""
    worst = [
        padding(fills_of(random_mixture(seed, order_version=1), 700)[0], 8).max(initial=0)
        for seed in range(1, 20, 2)
    ]
    assert max(worst) > 0.5


@pytest.mark.parametrize("seed", range(30))
def test_a_block_holds_what_it_held_before_it_was_levelled_and_permuted(seed):
    """Each token once, in the same block; text that flows may be cut elsewhere."""
    two, one = random_mixture(seed), random_mixture(seed, order_version=1)
    for block in (0, 1, 4):
        phases = [mixture.locate(0).phase for mixture in (one, two)]
        if [p.rates for p in phases[:1]] != [p.rates for p in phases[1:]]:
            return  # a version that takes more conversations, or less text, into a block
        tokens = []
        for mixture, phase in zip((one, two), phases, strict=True):
            packed = mixture.block(phase, block)
            parts = packed.parts
            columns = (packed.source, parts.epoch, parts.document, parts.start, parts.stop)
            rows = np.stack(columns, axis=1).tolist()
            tokens.append(Counter((*row[:3], n) for row in rows for n in range(*row[3:])))
            assert set(tokens[-1].values()) == {1}
        assert tokens[0] == tokens[1]


def test_the_emptier_sequences_are_spread_over_the_block():
    """Before, they were at the end of it."""
    cursors = cursors_of(["texts of one length"], 1, isolated=True)
    weights = MixtureWeights((SourceWeight(next(iter(cursors)), 1.0),), reserve=0.1)
    mixture = Mixture(weights, cursors, 1, SEQ_LENGTH, 0, 512)
    fills, _ = fills_of(mixture, 1024)
    emptier = np.flatnonzero(fills < fills.max())
    assert 100 < len(emptier) < 924
    quarters = np.bincount(emptier // 128, minlength=8)
    assert quarters.min() > len(emptier) / 16
    places = [set(np.flatnonzero(half < fills.max())) for half in (fills[:512], fills[512:])]
    assert places[0] != places[1]  # another order in each block


def test_the_seed_gives_the_order():
    def order(seed):
        cursors = cursors_of(["texts"], 5, isolated=True)
        weights = MixtureWeights((SourceWeight("texts 0", 1.0),))
        mixture = Mixture(weights, cursors, seed, SEQ_LENGTH, 0, 64)
        return [mixture.sequence(n).parts.document.tolist() for n in range(64)]

    assert order(1) == order(1) != order(2)


def test_the_run_ends_with_its_emptiest_sequence():
    for seed in range(20):
        cursors = cursors_of(["texts", "pairs"], seed, isolated=bool(seed % 2))
        weights = MixtureWeights(tuple(SourceWeight(key, 1.0, 1) for key in cursors))
        fills, ended = fills_of(Mixture(weights, cursors, seed, SEQ_LENGTH, 0, 64), 10**6)
        assert ended and fills[-1] > 0
        last_block = fills[len(fills) // 64 * 64 :]
        assert fills[-1] == last_block.min()


def test_what_is_left_may_be_less_than_half_a_document():
    """The end of the last block is nearest to the end of the source: no block follows."""
    ended = set()
    for seed in range(60):
        draw = np.random.default_rng(seed)
        corpus = ListCorpus(texts(draw, 5, 45, 100))
        cursors = {"a": Cursor(SourceStream(corpus, VOCABULARY, seed, 0, SEQ_LENGTH, True))}
        mixture = Mixture(
            MixtureWeights((SourceWeight("a", 1.0, 1),)), cursors, seed, SEQ_LENGTH, 0, 5
        )
        fills, _ = fills_of(mixture, 10**6)
        assert round(fills.sum() * SEQ_LENGTH) == corpus.tokens
        ended.add(len(fills) % 5 == 0)
    assert ended == {True, False}


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.3, 0.3, 0.4), (1.0, 1.0, 1.0, 1.0, 3.0)])
def test_shares_of_text_that_are_no_whole_numbers_fit_into_every_block(weights):
    cursors = cursors_of(["texts"] * len(weights), 1, isolated=False)
    shares = tuple(SourceWeight(key, w) for key, w in zip(cursors, weights, strict=True))
    mixture = Mixture(MixtureWeights(shares), cursors, 1, SEQ_LENGTH, 0, 64)
    for block in range(40):
        packed = mixture.block(mixture.locate(0).phase, block)
        room = 64 * SEQ_LENGTH - packed.parts.tokens.sum()
        assert 0 <= room <= 2 * len(weights)


def test_conversations_that_are_left_out_leave_no_room_empty():
    """Half of the tokens are in conversations that are longer than a sequence."""
    draw = np.random.default_rng(1)
    corpus = Conversations(texts(draw, 4, 16, 1000) + texts(draw, 70, 140, 120))
    cursors = {"a": Cursor(SourceStream(corpus, VOCABULARY, 1, 0, SEQ_LENGTH))}
    mixture = Mixture(MixtureWeights((SourceWeight("a", 1.0),)), cursors, 1, SEQ_LENGTH, 0, 512)
    fills, _ = fills_of(mixture, 2048)
    assert fills.mean() > 0.95
