"""What each sample of a run holds: sources, stages, epochs and blocks, all in closed form.

A **block** is ``block_sequences`` consecutive samples. Block b of a mixture takes from each source
the tokens between two positions of the source's stream, ``rate.before(b)`` and
``rate.before(b + 1)`` (``phases.py``). The rates are proportional to the weights, so weights are
shares of the tokens, exact to a token at the end of each block (or to a document, where documents
may not be cut), and no table of the length of the run is needed. A block is packed (``packing.py``)
when one of its samples is asked for.

A **phase** is a stretch of blocks with the same rates (``phase_planner.py``). It ends where stage 2
begins, which may be at any sample, or when a source with a limited number of epochs is exhausted.
The block in which that happens is a phase of its own, in which the other sources take the rest. The
last block of a phase may hold sequences that are no longer used; their content comes first in the
next phase. The same happens when the mixture is edited (``mixture_history.py``): nothing is
repeated or skipped within a source.

Source: paper, section 2.2 (two stages; in the second, the sources of the first have half of their
weight).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chameleon.data.mixture.block_items import items_of_block
from megatron_chameleon.data.mixture.packing import DoesNotFitError, Even, PackedSequences, pack
from megatron_chameleon.data.mixture.permutation import shuffled
from megatron_chameleon.data.mixture.phase_planner import ExhaustedError, PhasePlanner
from megatron_chameleon.data.mixture.phases import MixtureWeights, Phase, SourceWeight
from megatron_chameleon.data.mixture.stream import Cursor, DocumentParts
from megatron_chameleon.errors import DataError

__all__ = [
    "BLOCK_SEQUENCES",
    "ExhaustedError",
    "Mixture",
    "MixtureWeights",
    "Phase",
    "SampleLocation",
    "SourceWeight",
]

BLOCK_SEQUENCES = 2048
ORDER_VERSION = 2
"""In version 1 the last sequences of a block may be nearly empty. In version 2 a block's sequences
are levelled and permuted. Runs that began with version 1 keep it."""
_CACHED_BLOCKS = 2
_SEQUENCE_ORDER = 4
"""A use of random numbers; those of ``stream.py`` have the numbers below."""


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample lies within its mixture."""

    phase: Phase
    block: int
    """Number of the block within the phase."""
    sequence: int
    """Number of the sequence within the block."""


@dataclass
class Mixture:
    """The samples of a run, from one of them on.

    Args:
        weights: Sources and their proportions.
        cursors: Where each source stands at ``first_sample``.
        seed: Seed of the run.
        seq_length: Tokens of a sequence.
        first_sample: The run's sample at which the mixture begins.
        block_sequences: Sequences of a block, at least 1.
        order_version: 1 or ``ORDER_VERSION``.
    """

    weights: MixtureWeights
    cursors: Mapping[str, Cursor]
    seed: int
    seq_length: int
    first_sample: int = 0
    block_sequences: int = BLOCK_SEQUENCES
    order_version: int = ORDER_VERSION

    def __post_init__(self) -> None:
        self._planner = PhasePlanner(
            self.weights, self.seq_length, self.block_sequences, self.order_version
        )
        self._phases: list[Phase] = []
        self._blocks: OrderedDict[tuple[int, int], PackedSequences] = OrderedDict()

    @property
    def source_names(self) -> list[str]:
        """The keys of all sources of the mixture."""
        return list(self.cursors)

    def locate(self, sample: int) -> SampleLocation:
        """Find the block of a sample, and its place in it.

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
        """List the phases that begin within the first ``samples`` samples of the run.

        Raises:
            ExhaustedError: The sources do not reach that far.
        """
        while not self._phases or (
            self._phases[-1].end_sample is not None and self._phases[-1].end_sample < samples
        ):
            self._phases.append(self._next_phase())
        return [phase for phase in self._phases if phase.first_sample < samples]

    def phases_to_end(self, samples: int) -> list[Phase]:
        """The same, but no further than to the end of the sources."""
        try:
            return self.phases(samples)
        except ExhaustedError:
            return [phase for phase in self._phases if phase.first_sample < samples]

    def sequence(self, sample: int) -> PackedSequences:
        """The document parts of one sample; its ``source`` counts ``source_names``."""
        place = self.locate(sample)
        return self.block(place.phase, place.block).of(place.sequence)

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
        """Where each source stands before a sample, including what has been taken but not used."""
        try:
            if sample == self.first_sample:
                return dict(self.cursors)
            place = self.locate(sample - 1)
        except ExhaustedError as error:  # the last step is filled up with padding
            return self.cursors_at(error.samples)
        return self._cursors_after(place.phase, place.block, place.sequence + 1)

    def _cursors_after(self, phase: Phase, block: int, sequences: int) -> dict[str, Cursor]:
        """Where each source stands after so many sequences of a block."""
        left = None
        if sequences < phase.sequences:
            left = self.block(phase, block)
        found = dict(phase.cursors)
        for number, (key, cursor) in enumerate(phase.cursors.items()):
            if key in phase.rates:
                unused = DocumentParts.join([]) if left is None else left.behind(sequences, number)
                found[key] = cursor.moved(phase.position(key, block + 1), unused)
        return found

    def _next_phase(self) -> Phase:
        if not self._phases:
            return self._planner.plan(self.first_sample, dict(self.cursors))
        last = self._phases[-1]
        assert last.end_sample is not None
        block, sequence = divmod(last.end_sample - 1 - last.first_sample, last.sequences)
        cursors = self._cursors_after(last, block, sequence + 1)
        return self._planner.plan(last.end_sample, cursors)

    def _pack(self, phase: Phase, block: int) -> PackedSequences:
        items = items_of_block(phase, block, self.seq_length)
        first = phase.first_sample + block * phase.sequences
        order = shuffled(len(items.whole), self.seed, first)
        streams = [cursor.stream for cursor in phase.cursors.values()]

        def last_cut(source: int, part: DocumentParts, inside: int) -> int:
            return streams[source].last_cut(part, inside)

        even = None
        if self.order_version > 1:
            even = Even((self.seed, first, _SEQUENCE_ORDER), phase.ends_run)
        try:
            return pack(items, phase.sequences, self.seq_length, order, last_cut, even)
        except DoesNotFitError as error:
            what = (
                f"the {int(items.parts.tokens.sum())} tokens of {', '.join(phase.rates)} for the "
                f"samples {first} to {first + phase.sequences - 1} do not fit into them, because "
                "images are spread unevenly over the files"
            )
            remedy = f"Raise data.packing_reserve above {self.weights.reserve} and resume"
            raise DataError("data", what, remedy) from error
