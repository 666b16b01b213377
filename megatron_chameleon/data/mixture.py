"""Which source a sample comes from: a pure function of its index, with exact shares, in two stages.

The sources of a stage are the leaves of a binary tree. Of the first n samples that reach a node,
``round(n * share)`` go to its left child and the others to its right, so sample n goes left exactly
when that number grows, and it is known in closed form how many went there before. Hence every
prefix of the run has each source's share to within a sample or two, a source's own indices are 0,
1, 2, ... without a hole, and no table of the run's length is needed. Shares are whole multiples of
2^-52 and the arithmetic is on integers, so it is the same everywhere and at any index.

Source: paper, section 2.2 (two stages; in the second, the first stage's sources have half of their
weight).
"""

from collections.abc import Sequence
from dataclasses import dataclass

_ONE = 1 << 52


@dataclass(frozen=True)
class _Node:
    """A source, or a split of samples between two nodes."""

    sources: tuple[int, ...]
    share: int = 0
    """What the left child gets, in units of 2^-52."""
    left: "_Node | None" = None
    right: "_Node | None" = None

    def left_count(self, samples: int) -> int:
        """How many of the node's first samples go to its left child."""
        return (2 * samples * self.share + _ONE) // (2 * _ONE)


class Mixture:
    """Source and index within the source of each sample of a run.

    Sources are numbered through: those of stage 1 first, then those of stage 2.

    Args:
        stage1: Weights of the sources from the first sample on; positive, of any sum, at least one.
        stage2: Weights of the sources that join in stage 2; with none, stage 1 goes on unchanged.
        stage1_samples: Samples of the run that belong to stage 1.
        stage2_share: Share of stage 2 that its own sources get, in [0, 1]; stage-1 sources keep
            their proportions in the rest, and each goes on in its data where stage 1 left it.
    """

    def __init__(
        self,
        stage1: Sequence[float],
        stage2: Sequence[float] = (),
        stage1_samples: int = 0,
        stage2_share: float = 0.5,
    ) -> None:
        assert stage1 and all(weight > 0 for weight in (*stage1, *stage2)), (
            "weights are checked by the caller"
        )
        self.sources = len(stage1) + len(stage2)
        self._boundary = stage1_samples if stage2 else None
        first = [weight / sum(stage1) for weight in stage1]
        self._tree1 = _tree(first, range(len(stage1)))
        self._tree2 = self._tree1
        if stage2:
            second = [(1 - stage2_share) * share for share in first]
            second += [stage2_share * weight / sum(stage2) for weight in stage2]
            self._tree2 = _tree(second, range(self.sources))
        self._used_in_stage1 = _counts(self._tree1, stage1_samples, self.sources)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample and its index within that source.

        Args:
            sample: Index within the whole run, >= 0.
        """
        if self._boundary is None or sample < self._boundary:
            return _locate(self._tree1, sample)
        source, index = _locate(self._tree2, sample - self._boundary)
        return source, self._used_in_stage1[source] + index

    def counts(self, samples: int) -> list[int]:
        """How many of the run's first samples come from each source: [sources]."""
        if self._boundary is None or samples <= self._boundary:
            return _counts(self._tree1, samples, self.sources)
        second = _counts(self._tree2, samples - self._boundary, self.sources)
        return [a + b for a, b in zip(self._used_in_stage1, second, strict=True)]


def _tree(shares: Sequence[float], sources: Sequence[int]) -> _Node:
    """Halve by share, so that each level's rounding error (1/2) shrinks with the shares below."""
    ordered = sorted(sources, key=lambda source: (-shares[source], source))
    return _split(shares, tuple(ordered))


def _split(shares: Sequence[float], sources: tuple[int, ...]) -> _Node:
    if len(sources) == 1:
        return _Node(sources)
    total = sum(shares[source] for source in sources)
    cut, left = 1, shares[sources[0]]
    while cut < len(sources) - 1 and left + shares[sources[cut]] <= total / 2:
        left += shares[sources[cut]]
        cut += 1
    share = min(_ONE, round(left / total * _ONE)) if total > 0 else _ONE
    return _Node(sources, share, _split(shares, sources[:cut]), _split(shares, sources[cut:]))


def _locate(node: _Node, index: int) -> tuple[int, int]:
    while node.left is not None and node.right is not None:
        before = node.left_count(index)
        goes_left = node.left_count(index + 1) > before
        index = before if goes_left else index - before
        node = node.left if goes_left else node.right
    return node.sources[0], index


def _counts(tree: _Node, samples: int, sources: int) -> list[int]:
    counts = [0] * sources
    waiting = [(tree, samples)]
    while waiting:
        node, here = waiting.pop()
        if node.left is None or node.right is None:
            counts[node.sources[0]] = here
            continue
        left = node.left_count(here)
        waiting += [(node.left, left), (node.right, here - left)]
    return counts
