"""What each sample of a run holds: sources, stages, epochs and blocks, all in closed form.

A **block** is ``block_sequences`` samples in a row. Block b of a mixture takes from each source the
tokens between positions ``b * amount`` and ``(b + 1) * amount`` of the source's stream, where the
amounts are as the weights: so weights are shares of the tokens, exact to a token at each block's
end (to a document, where it may not be cut), and no table of the run's length is needed. The block
is packed (``packing.py``) when one of its samples is asked for.

A block must hold what falls to it. The amounts of a mixture together are therefore a little less
than its sequences have room for: less by ``reserve``, by one sequence for each source whose
documents may not be cut anywhere, and, where documents that stay whole leave room that no text
fills, by what two trial blocks leave.

A **phase** is a time of fixed amounts. It ends where stage 2 begins, at any sample, or when a
source with a limited number of epochs is exhausted: the block in which that happens is a phase of
its own, in which the other sources take the rest. What the last block of a phase holds in sequences
that are not used any more comes first in the next phase, and so it is when the mixture is edited
(``history.py``): nothing is repeated or skipped within a source.

Source: paper, section 2.2 (two stages; in the second, the first stage's sources have half of their
weight).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.packing import (
    DoesNotFitError,
    PackedSequences,
    PackingItems,
    pack,
    sequences_needed,
)
from megatron_chameleon.data.mixture.permutation import shuffled
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts
from megatron_chameleon.errors import DataError

BLOCK_SEQUENCES = 2048
_ONE = 1 << 52
_CACHED_BLOCKS = 2


@dataclass(frozen=True)
class SourceWeight:
    """One source of a stage."""

    key: str
    """Names the source."""
    weight: float
    """Above 0; the weights of a stage need not sum to 1."""
    epochs: int | None = None
    """How often its documents may be read at most; None for no end."""


@dataclass(frozen=True)
class MixtureWeights:
    """Which sources a run has when, and in what proportions."""

    stage1: tuple[SourceWeight, ...]
    stage2: tuple[SourceWeight, ...] = ()
    stage2_share: float = 0.5
    """Share of stage 2 that its own sources get, in [0, 1]."""
    stage1_samples: int = 0
    """Sample of the run at which stage 2 begins, if it has sources."""
    reserve: float = 0.002
    """Share of the sequences' tokens that is left free for uneven documents, in [0, 1)."""

    def of_stage(self, stage: int) -> dict[str, tuple[float, int | None]]:
        """Weight and epochs of each source of a stage."""
        first = sum(share.weight for share in self.stage1)
        keep = 1.0 if stage == 1 else 1 - self.stage2_share
        found = {s.key: (keep * s.weight / first, s.epochs) for s in self.stage1}
        if stage == 2:
            second = sum(share.weight for share in self.stage2)
            found |= {s.key: (self.stage2_share * s.weight / second, s.epochs) for s in self.stage2}
        return {key: value for key, value in found.items() if value[0] > 0}


@dataclass(frozen=True)
class Phase:
    """Samples with the same amounts from the same sources."""

    stage: int
    first_sample: int
    end_sample: int | None
    """None for no end."""
    cursors: Mapping[str, Cursor]
    """Every source of the run, also those without an amount."""
    amounts: Mapping[str, int]
    """Tokens that a block takes from a source, in units of 2^-52."""
    sequences: int
    """Of one block."""

    def position(self, key: str, block: int) -> int:
        """Tokens that the phase has taken from a source before a block."""
        return self.amounts[key] * block >> 52


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample stands."""

    phase: Phase
    block: int
    sequence: int


@dataclass
class Mixture:
    """The samples of a run from one on.

    Args:
        weights: Sources and proportions.
        cursors: Where each source stands at ``first_sample``.
        seed: Seed of the run.
        seq_length: Tokens of a sequence.
        first_sample: Of the run.
        block_sequences: At least 1.
    """

    weights: MixtureWeights
    cursors: Mapping[str, Cursor]
    seed: int
    seq_length: int
    first_sample: int = 0
    block_sequences: int = BLOCK_SEQUENCES

    def __post_init__(self) -> None:
        self._phases: list[Phase] = []
        self._rates: dict[tuple[str, ...], int] = {}
        self._blocks: OrderedDict[tuple[int, int], PackedSequences] = OrderedDict()

    def locate(self, sample: int) -> SampleLocation:
        """The block of a sample, and its place in it.

        Args:
            sample: Index within the whole run, at least ``first_sample``.

        Raises:
            ExhaustedError: The sources do not reach that far.
        """
        assert sample >= self.first_sample, f"sample {sample} of a mixture from {self.first_sample}"
        for phase in self.phases(sample + 1):
            if phase.end_sample is None or sample < phase.end_sample:
                break
        return SampleLocation(phase, *divmod(sample - phase.first_sample, phase.sequences))

    def phases(self, samples: int) -> list[Phase]:
        """The phases that begin before so many samples of the run.

        Raises:
            ExhaustedError: The sources do not reach that far.
        """
        while not self._phases or (
            self._phases[-1].end_sample is not None and self._phases[-1].end_sample < samples
        ):
            self._phases.append(self._next_phase())
        return [phase for phase in self._phases if phase.first_sample < samples]

    def sequence(self, sample: int) -> PackedSequences:
        """The parts of one sample; its ``source`` counts ``source_names``."""
        place = self.locate(sample)
        return self.block(place.phase, place.block).of(place.sequence)

    @property
    def source_names(self) -> list[str]:
        """All sources of the run."""
        return list(self.cursors)

    def block(self, phase: Phase, block: int) -> PackedSequences:
        """A whole block, packed."""
        key = (phase.first_sample, block)
        found = self._blocks.get(key)
        if found is None:
            found = self._pack(phase, block)
            self._blocks[key] = found
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return found

    def cursors_at(self, sample: int) -> dict[str, Cursor]:
        """Where each source stands before a sample: behind it comes what was not used yet."""
        if sample == self.first_sample:
            return dict(self.cursors)
        place = self.locate(sample - 1)
        return self._cursors_after(place.phase, place.block, place.sequence + 1)

    def _cursors_after(self, phase: Phase, block: int, sequences: int) -> dict[str, Cursor]:
        """After so many sequences of a block."""
        left = None
        if sequences < phase.sequences:
            left = self.block(phase, block)
        found = dict(phase.cursors)
        for number, (key, cursor) in enumerate(phase.cursors.items()):
            if key in phase.amounts:
                unused = DocumentParts.join([]) if left is None else left.behind(sequences, number)
                found[key] = cursor.moved(phase.position(key, block + 1), unused)
        return found

    def _next_phase(self) -> Phase:
        first, cursors = self.first_sample, dict(self.cursors)
        if self._phases:
            last = self._phases[-1]
            assert last.end_sample is not None
            first = last.end_sample
            block, sequence = divmod(first - 1 - last.first_sample, last.sequences)
            cursors = self._cursors_after(last, block, sequence + 1)
        border = self.weights.stage1_samples
        stage = 2 if self.weights.stage2 and first >= border else 1
        shares, left = {}, {}
        for key, (weight, epochs) in self.weights.of_stage(stage).items():
            left[key] = None if epochs is None else cursors[key].tokens_left(epochs)
            if left[key] != 0:
                shares[key] = weight
        if not shares:
            raise ExhaustedError(first)
        amounts, blocks = _amounts(shares, left, lambda some: self._rate(some, cursors))
        sequences = self.block_sequences
        if all(left[key] == amount >> 52 for key, amount in amounts.items()):
            items = self._items(Phase(stage, first, None, cursors, amounts, sequences), 0)
            sequences = min(sequences, sequences_needed(items, self.seq_length))
        end = None if blocks is None else first + blocks * sequences
        if self.weights.stage2 and stage == 1 and (end is None or end > border):
            end = border
        return Phase(stage, first, end, cursors, amounts, sequences)

    def _rate(self, shares: Mapping[str, float], cursors: Mapping[str, Cursor]) -> int:
        """Tokens that a block of these sources can hold with certainty."""
        names = tuple(shares)
        if names not in self._rates:
            capacity = self.block_sequences * self.seq_length
            uneven = sum(not cursors[key].stream.is_exact for key in shares)
            rate = float(capacity)
            if uneven:
                fill = min(self._trial(shares, cursors, share) for share in (0.0, 0.5))
                rate = capacity * fill * (1 - self.weights.reserve) - uneven * self.seq_length
            self._rates[names] = max(int(rate), capacity // 2)
        return self._rates[names]

    def _trial(
        self, shares: Mapping[str, float], cursors: Mapping[str, Cursor], epoch: float
    ) -> float:
        """Share of the room that is used when a full block is packed tightly."""
        if epoch:
            streams = {key: cursor.stream for key, cursor in cursors.items()}
            cursors = {
                key: Cursor(stream, round(epoch * stream.corpus.tokens))
                for key, stream in streams.items()
            }
        capacity = self.block_sequences * self.seq_length
        amounts, _ = _amounts(shares, dict.fromkeys(shares), lambda _: capacity)
        items = self._items(Phase(1, 0, None, cursors, amounts, self.block_sequences), 0)
        tokens = int(items.parts.tokens.sum())
        needed = sequences_needed(items, self.seq_length)
        return min(1.0, tokens / (needed * self.seq_length)) if needed > 1 else 1.0

    def _pack(self, phase: Phase, block: int) -> PackedSequences:
        items = self._items(phase, block)
        first = phase.first_sample + block * phase.sequences
        order = shuffled(len(items.whole), self.seed, first)
        streams = [cursor.stream for cursor in phase.cursors.values()]

        def last_cut(source: int, part: DocumentParts, inside: int) -> int:
            return streams[source].last_cut(part, inside)

        try:
            return pack(items, phase.sequences, self.seq_length, order, last_cut)
        except DoesNotFitError as error:
            names = ", ".join(phase.amounts)
            what = (
                f"samples {first} to {first + phase.sequences - 1} are to hold "
                f"{int(items.parts.tokens.sum())} tokens of {names}, and they do not fit: images "
                "are spread unevenly over the files"
            )
            remedy = f"Raise data.packing_reserve above {self.weights.reserve} and resume"
            raise DataError("data", what, remedy) from error

    def _items(self, phase: Phase, block: int) -> PackingItems:
        """The documents of a block: the sources' streams, merged evenly."""
        groups, sources, places, whole = [], [], [], []
        for number, (key, cursor) in enumerate(phase.cursors.items()):
            if key not in phase.amounts:
                continue
            first, last = (phase.position(key, b) for b in (block, block + 1))
            parts = cursor.parts(first, last)
            flows = ~parts.stays_whole & (not cursor.stream.isolated)
            parts, flows = self._cut_long(parts, flows, cursor)
            tokens = parts.tokens
            groups.append(parts)
            sources.append(np.full(len(tokens), number))
            places.append((np.cumsum(tokens) - tokens / 2) / max(1, int(tokens.sum())))
            whole.append(~flows)
        order = np.argsort(np.concatenate(places), kind="stable")
        parts = DocumentParts.join(groups).take(order)
        return PackingItems(parts, np.concatenate(sources)[order], np.concatenate(whole)[order])

    def _cut_long(
        self, parts: DocumentParts, flows: np.ndarray, cursor: Cursor
    ) -> tuple[DocumentParts, np.ndarray]:
        """Cut what is longer than a sequence and does not flow, at text."""
        long = (parts.tokens > self.seq_length) & ~flows
        if not long.any():
            return parts, flows
        groups, flags, done = [], [], 0
        for index in np.flatnonzero(long).tolist():
            groups += [parts.take(slice(done, index)), *self._parts_of(parts, index, cursor)]
            flags += [flows[done:index], np.zeros(len(groups[-1]), dtype=bool)]
            done = index + 1
        groups.append(parts.take(slice(done, None)))
        flags.append(flows[done:])
        return DocumentParts.join(groups), np.concatenate(flags)

    def _parts_of(self, parts: DocumentParts, index: int, cursor: Cursor) -> list[DocumentParts]:
        rest = parts.take(np.array([index]))
        starts = [int(rest.start[0])]
        stop = int(rest.stop[0])
        while stop - starts[-1] > self.seq_length:
            count = cursor.stream.last_cut(rest, self.seq_length)
            if count == 0:
                raise DataError(
                    f"{cursor.stream.corpus.prefix}: document {int(rest.document[0])}",
                    f"an image at token {starts[-1]} is longer than model.seq_length "
                    f"{self.seq_length}",
                    "Choose a model.seq_length that holds a whole image",
                )
            starts.append(starts[-1] + count)
            rest.start[0] = starts[-1]
        many = parts.take(np.full(len(starts), index))
        many.start[:] = starts
        many.stop[:] = [*starts[1:], stop]
        return [many]


class ExhaustedError(Exception):
    """No source is left; the samples of the run end here.

    Args:
        samples: How many there are.
    """

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.samples = samples


def _amounts(
    shares: Mapping[str, float],
    left: Mapping[str, int | None],
    rate_of: Callable[[Mapping[str, float]], int],
) -> tuple[dict[str, int], int | None]:
    """Tokens a block of each source in units of 2^-52, and for how many blocks.

    A source that has less left than a block wants gives what it has, for one block, and the others
    fill the rest of it.
    """
    rate = rate_of(shares)
    amounts = _split(shares, rate)
    given: dict[str, int] = {}
    while short := {
        key: tokens
        for key, amount in amounts.items()
        if key not in given and (tokens := left[key]) is not None and tokens < amount >> 52
    }:
        given |= short
        amounts = {key: tokens * _ONE for key, tokens in given.items()}
        rest = {key: weight for key, weight in shares.items() if key not in given}
        if rest:
            room = max(0, rate - sum(given.values()))
            amounts |= _split(rest, min(room, rate_of(rest) * room // rate))
    if given:
        return amounts, 1
    blocks = [
        (tokens * _ONE + _ONE - 1) // amounts[key]
        for key in amounts
        if (tokens := left[key]) is not None
    ]
    return amounts, max(1, min(blocks)) if blocks else None


def _split(shares: Mapping[str, float], tokens: int) -> dict[str, int]:
    total = sum(shares.values())
    return {key: round(weight / total * _ONE) * tokens for key, weight in shares.items()}
