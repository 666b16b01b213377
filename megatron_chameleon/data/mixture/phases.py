"""Which sources a run reads when, and in what proportions: weights and phases."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chameleon.data.mixture.rates import TokensPerBlock
from megatron_chameleon.data.mixture.stream import Cursor


@dataclass(frozen=True)
class SourceWeight:
    """One source of a stage."""

    key: str
    """Identifies the source."""
    weight: float
    """Above 0; the weights of a stage need not sum to 1."""
    epochs: int | None = None
    """How often its documents may be read at most; None for no limit."""


@dataclass(frozen=True)
class MixtureWeights:
    """The sources of both stages and their proportions."""

    stage1: tuple[SourceWeight, ...]
    stage2: tuple[SourceWeight, ...] = ()
    stage2_share: float = 0.5
    """Share of stage 2 that its own sources get, in [0, 1]; the rest goes to those of stage 1."""
    stage1_samples: int = 0
    """The run's sample at which stage 2 begins, if it has sources."""
    reserve: float = 0.002
    """Share of a block's room that is left free because documents fill it unevenly, in [0, 1)."""

    def of_stage(self, stage: int) -> dict[str, tuple[float, int | None]]:
        """Weight and limit of epochs of each source of a stage; the weights sum to 1."""
        first = sum(source.weight for source in self.stage1)
        keep = 1.0 if stage == 1 else 1 - self.stage2_share
        found = {s.key: (keep * s.weight / first, s.epochs) for s in self.stage1}
        if stage == 2:
            second = sum(source.weight for source in self.stage2)
            found |= {s.key: (self.stage2_share * s.weight / second, s.epochs) for s in self.stage2}
        return {key: value for key, value in found.items() if value[0] > 0}


@dataclass(frozen=True)
class Phase:
    """A stretch of samples in which each block takes the same number of tokens from each source."""

    stage: int
    """1 or 2."""
    first_sample: int
    end_sample: int | None
    """The sample after the last; None for no end."""
    cursors: Mapping[str, Cursor]
    """Where every source of the run stands before the phase, also those that it does not use."""
    rates: Mapping[str, TokensPerBlock]
    """What each block takes from the sources that the phase uses."""
    sequences: int
    """Number of sequences of a block."""

    def position(self, key: str, block: int) -> int:
        """Tokens that the phase has taken from a source before a block."""
        return self.rates[key].before(block)

    def shares(self) -> dict[str, float]:
        """Share of each source in the tokens of the phase; they sum to 1."""
        total = sum(rate.units for rate in self.rates.values())
        return {key: rate.units / total for key, rate in self.rates.items()}
