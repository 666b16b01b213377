"""The mixture: exact shares, contiguous indices, and no dependence on who asks in which order."""

import random

import pytest

from megatron_chameleon.data.mixture import Mixture


def random_mixtures(count):
    draw = random.Random(7)
    for _ in range(count):
        stage1 = [10 ** draw.uniform(-3, 1) for _ in range(draw.randint(1, 7))]
        stage2 = [10 ** draw.uniform(-3, 1) for _ in range(draw.randint(0, 5))]
        yield stage1, stage2, draw.randint(0, 700), draw.choice([0.0, 0.3, 0.5, 1.0])


CASES = list(random_mixtures(30))


@pytest.mark.parametrize("case", CASES)
def test_indices_of_each_source_count_up_without_a_hole(case):
    mixture = Mixture(*case)
    expected = [0] * mixture.sources
    for sample in range(1500):
        assert mixture.counts(sample) == expected
        source, index = mixture.locate(sample)
        assert index == expected[source]
        expected[source] += 1


@pytest.mark.parametrize("case", CASES)
def test_each_prefix_has_the_exact_shares(case):
    stage1, stage2, boundary, share = case
    mixture = Mixture(*case)
    first = [w / sum(stage1) for w in stage1] + [0.0] * len(stage2)
    second = first
    if stage2:
        second = [(1 - share) * s for s in first[: len(stage1)]]
        second += [share * w / sum(stage2) for w in stage2]
    else:
        boundary = 10**9
    for samples in [*range(0, 1500, 7), 10**6, 10**12]:
        in_first, in_second = min(samples, boundary), max(0, samples - boundary)
        errors = [
            count - a * in_first - b * in_second
            for count, a, b in zip(mixture.counts(samples), first, second, strict=True)
        ]
        # Each level of the tree adds 1/2 at most to its share of the error above: 1.6 was the worst
        # sum over 60,000 random trees. At 10^12 samples the shares' 2^-52 add 1e-4.
        assert max(map(abs, errors)) <= (3.2 if stage2 and in_second else 1.6), samples


def test_any_order_of_access_gives_the_same():
    case = ([3.0, 1.0], [2.0, 5.0], 300, 0.5)
    forwards = [Mixture(*case).locate(sample) for sample in range(900)]
    order = list(range(900))
    random.Random(1).shuffle(order)
    other = Mixture(*case)
    for sample in order:
        assert other.locate(sample) == forwards[sample]


def test_stages_have_their_sources():
    mixture = Mixture([3.0, 1.0], [1.0], stage1_samples=400, stage2_share=0.5)
    assert mixture.counts(400) == [300, 100, 0]
    assert mixture.counts(800) == [450, 150, 200]
    assert mixture.locate(400)[1] in (300, 100, 0)  # each goes on where stage 1 left it


def test_without_stage_2_stage_1_goes_on():
    short = Mixture([3.0, 1.0], stage1_samples=4)
    long = Mixture([3.0, 1.0], stage1_samples=4000)
    assert [short.locate(i) for i in range(100)] == [long.locate(i) for i in range(100)]


@pytest.mark.parametrize(("share", "second"), [(0.0, [75, 25, 0]), (1.0, [0, 0, 100])])
def test_stage_2_may_be_all_or_nothing(share, second):
    mixture = Mixture([3.0, 1.0], [1.0], stage1_samples=0, stage2_share=share)
    assert mixture.counts(100) == second


def test_far_samples_cost_nothing():
    mixture = Mixture([1.0, 2.0, 4.0])
    source, index = mixture.locate(7 * 10**15)
    assert index == mixture.counts(7 * 10**15)[source]
