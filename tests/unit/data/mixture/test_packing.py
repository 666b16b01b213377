"""Packing: nothing is lost, images stay whole, the best fit, the recipe's padding."""

import numpy as np
import pytest

from megatron_chameleon.data.mixture.mixture import Mixture, MixtureWeights, SourceWeight
from megatron_chameleon.data.mixture.packing import (
    DoesNotFitError,
    PackingItems,
    pack,
    sequences_needed,
)
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts, SourceStream
from synthetic_corpus import VOCABULARY, EndlessCorpus

SEQ_LENGTH = 100


def items_of(lengths, whole):
    """Documents of one source; ``whole`` is one flag for all or one for each."""
    stop = np.array(lengths)
    zero = np.zeros_like(stop)
    whole = np.broadcast_to(whole, stop.shape).copy()
    return PackingItems(
        DocumentParts(zero, np.arange(len(stop)), zero, stop, stop, whole), zero, whole
    )


def packed(items, sequences, last_cut=lambda source, part, inside: inside):
    order = np.arange(len(items.whole))[::-1]
    return pack(items, sequences, SEQ_LENGTH, order, last_cut)


def contents(result):
    """(document, start, stop) of each sequence."""
    parts = result.parts
    rows = zip(parts.document.tolist(), parts.start.tolist(), parts.stop.tolist(), strict=True)
    found = [[] for _ in range(result.sequences)]
    for sequence, row in zip(result.sequence.tolist(), rows, strict=True):
        found[sequence].append(row)
    return found


def test_text_flows_from_sequence_to_sequence():
    result = packed(items_of([70, 70, 160], whole=False), 3)
    assert contents(result) == [
        [(1, 0, 30), (0, 0, 70)],  # ``order`` puts the last item first
        [(2, 0, 60), (1, 30, 70)],
        [(2, 60, 160)],
    ]


def test_text_fills_what_whole_documents_leave():
    result = packed(items_of([60, 100, 60, 80], whole=[True, False, True, False]), 3)
    assert [sum(stop - start for _, start, stop in row) for row in contents(result)] == [100] * 3
    whole = [row for rows in contents(result) for row in rows if row[0] in (0, 2)]
    assert whole == [(0, 0, 60), (2, 0, 60)]


def test_the_best_fit_is_the_sequence_that_it_leaves_least_room_in():
    result = packed(items_of([50, 70, 80, 30, 20, 50], whole=True), 3)
    assert sorted(map(sorted, contents(result))) == [
        [(0, 0, 50), (5, 0, 50)],
        [(1, 0, 70), (3, 0, 30)],
        [(2, 0, 80), (4, 0, 20)],
    ]


def test_padding_is_spread_over_the_sequences():
    result = packed(items_of([30] * 6, whole=False), 4)
    assert [sum(stop - start for _, start, stop in row) for row in contents(result)] == [45] * 4


def test_no_sequence_is_left_empty():
    result = packed(items_of([40, 40, 30], whole=True), 3)
    assert [len(row) for row in contents(result)] == [1, 1, 1]


def test_what_does_not_fit_is_cut_at_last():
    result = packed(items_of([60, 60, 60], whole=True), 2)
    parts = sorted(row for rows in contents(result) for row in rows)
    assert parts == [(0, 0, 60), (1, 0, 60), (2, 0, 40), (2, 40, 60)]


def test_what_cannot_be_cut_does_not_fit():
    with pytest.raises(DoesNotFitError):
        packed(items_of([60, 60, 60], whole=True), 2, lambda source, part, inside: 0)
    with pytest.raises(DoesNotFitError):
        packed(items_of([60, 60, 81], whole=False), 2)


def test_sequences_needed():
    assert sequences_needed(items_of([50, 70, 80, 30, 20, 50], whole=True), SEQ_LENGTH) == 3
    assert sequences_needed(items_of([60, 60, 60], whole=True), SEQ_LENGTH) == 3
    assert sequences_needed(items_of([60, 60, 60], whole=[True, False, False]), SEQ_LENGTH) == 2


def recipe_corpora():
    """Lengths as on the web (log-normal, mean 800), pairs of 1,026 + 45, interleaved documents of
    one to five images."""
    draw = np.random.default_rng(1)
    text = draw.lognormal(np.log(800) - 0.72, 1.2, 50_000).astype(int) + 3
    pairs = 1028 + draw.poisson(43, 10_000) + 1
    interleaved = draw.integers(1, 6, 4_000) * 1026 + draw.lognormal(5.5, 1, 4_000).astype(int) + 3
    # Cutting a longer one takes its tokens, which this corpus does not have.
    interleaved = interleaved[interleaved <= 4096]
    return tuple(
        EndlessCorpus(lengths, 100 * len(lengths), images=images)
        for lengths, images in ((text, False), (pairs, True), (interleaved, True))
    )


STAGE1 = (2.9, 1.5, 0.4)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("weights", [STAGE1, (*STAGE1, *STAGE1)], ids=["stage 1", "stage 2"])
def test_padding_is_below_one_percent_on_the_recipe_s_mixtures(weights, isolated):
    corpora = (recipe_corpora() * 2)[: len(weights)]
    cursors = {
        str(n): Cursor(SourceStream(corpus, VOCABULARY, 1, n, 4096, isolated))
        for n, corpus in enumerate(corpora)
    }
    shares = tuple(SourceWeight(key, weight) for key, weight in zip(cursors, weights, strict=True))
    mixture = Mixture(MixtureWeights(shares), cursors, seed=1, seq_length=4096)
    phase = mixture.locate(0).phase
    for block in (0, 1, 2, 1000):
        result = mixture.block(phase, block)
        filled = np.bincount(
            result.sequence, weights=result.parts.tokens, minlength=result.sequences
        )
        assert filled.max() <= 4096
        assert 1 - filled.mean() / 4096 < 0.01
        assert filled.min() > 0
        # Documents are whole, apart from text that flows.
        assert (
            isolated or (result.parts.tokens == result.parts.length)[result.parts.stays_whole].all()
        )
