"""Plans the phases of a mixture: what each block takes from its sources, and until which sample.

A block must be able to hold what falls to it. So the sources of a mixture together give a little
less than its sequences have room for. Text that may be cut anywhere fills every sequence. As soon
as a source has documents that may not be cut anywhere, three things are subtracted: the share
``reserve``, one sequence for each such source, and the room that stays empty between documents when
two full blocks are packed on trial, one from the start of the sources and one from their middle.

Positions in a stream also count the conversations that are left out because they are too long. From
version 2 of the order on, a block takes so much more that its sequences are full nevertheless.
"""

from collections.abc import Mapping

from megatron_chameleon.data.mixture.block_items import items_of_block
from megatron_chameleon.data.mixture.packing import sequences_needed
from megatron_chameleon.data.mixture.phases import MixtureWeights, Phase, plan_rates, split
from megatron_chameleon.data.mixture.stream import Cursor

_UNEVEN_LEFT_OUT = 0.01
"""How much more tokens a block may have than one on trial, because shuffle windows leave out
different shares of their conversations."""


class ExhaustedError(Exception):
    """All sources are exhausted; the samples of the run end here.

    Args:
        samples: Number of samples of the run.
    """

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.samples = samples


class PhasePlanner:
    """Plans one phase after the other.

    Args:
        weights: Sources and their proportions.
        seq_length: Tokens of a sequence.
        block_sequences: Sequences of a block.
        order_version: See ``mixture.py``.
    """

    def __init__(
        self, weights: MixtureWeights, seq_length: int, block_sequences: int, order_version: int
    ) -> None:
        self.weights = weights
        self.seq_length = seq_length
        self.block_sequences = block_sequences
        self.order_version = order_version
        self._capacities: dict[tuple[str, ...], int] = {}

    def plan(self, first_sample: int, cursors: Mapping[str, Cursor]) -> Phase:
        """Plan the phase that begins at a sample.

        Args:
            first_sample: The run's sample.
            cursors: Where each source stands then.

        Raises:
            ExhaustedError: No source has anything left.
        """
        border = self.weights.stage1_samples
        stage = 2 if self.weights.stage2 and first_sample >= border else 1
        shares, left = {}, {}
        for key, (weight, epochs) in self.weights.of_stage(stage).items():
            left[key] = None if epochs is None else cursors[key].tokens_left(epochs)
            if left[key] != 0:
                shares[key] = weight
        if not shares:
            raise ExhaustedError(first_sample)
        rates, blocks = plan_rates(shares, left, lambda some: self._capacity(some, cursors))
        sequences = self.block_sequences
        ends_run = all(left[key] == rate.whole_tokens for key, rate in rates.items())
        if ends_run:  # no more sequences than its documents need
            last = Phase(stage, first_sample, None, cursors, rates, sequences)
            items = items_of_block(last, 0, self.seq_length)
            sequences = min(sequences, sequences_needed(items, self.seq_length))
            if sequences == 0:  # what is left is a part of a document that is not cut
                raise ExhaustedError(first_sample)
        end = None if blocks is None else first_sample + blocks * sequences
        if self.weights.stage2 and stage == 1 and (end is None or end > border):
            end = border
        return Phase(stage, first_sample, end, cursors, rates, sequences, ends_run)

    def _capacity(self, shares: Mapping[str, float], cursors: Mapping[str, Cursor]) -> int:
        """Tokens that a block of these sources can certainly hold, counted as positions."""
        keys = tuple(shares)
        if keys not in self._capacities:
            room = self.block_sequences * self.seq_length
            uneven = sum(not cursors[key].stream.is_exact for key in shares)
            capacity = float(room)
            if uneven:
                fill = min(self._trial_fill(shares, cursors, epoch) for epoch in (0.0, 0.5))
                capacity = room * fill * (1 - self.weights.reserve)
                capacity -= uneven * self.seq_length * max(1.0, fill)
            elif self.order_version > 1:
                # Where the shares are no whole numbers, a block takes up to a token more from each
                # source but one than its share of the capacity.
                whole = all(rate.is_whole for rate in split(shares, room).values())
                capacity -= 0 if whole else len(shares) - 1
            self._capacities[keys] = max(int(capacity), room // 2)
        return self._capacities[keys]

    def _trial_fill(
        self, shares: Mapping[str, float], cursors: Mapping[str, Cursor], epoch: float
    ) -> float:
        """Pack a full block on trial, as tightly as possible.

        Args:
            shares: Weights of its sources.
            cursors: Where the sources stand.
            epoch: Where to take the documents from, in epochs; 0 takes them from ``cursors``.

        Returns:
            Share of the room that the documents fill, in (0, 1]; above 1 if a block can take more
            positions than it has room, because they count conversations that are left out.
        """
        if epoch:
            streams = {key: cursor.stream for key, cursor in cursors.items()}
            cursors = {
                key: Cursor(stream, round(epoch * stream.corpus.tokens))
                for key, stream in streams.items()
            }
        room = self.block_sequences * self.seq_length
        rates, _ = plan_rates(shares, dict.fromkeys(shares), lambda _: room)
        trial = Phase(1, 0, None, cursors, rates, self.block_sequences)
        items = items_of_block(trial, 0, self.seq_length)
        tokens = int(items.parts.tokens.sum())
        needed = sequences_needed(items, self.seq_length)
        if needed <= 1:
            return 1.0
        if self.order_version > 1 and any(cursors[key].stream.leaves_out for key in shares):
            return room / ((needed + 1) * self.seq_length) * (1 - _UNEVEN_LEFT_OUT)
        return min(1.0, tokens / (needed * self.seq_length))
