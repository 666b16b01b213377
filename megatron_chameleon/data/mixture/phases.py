"""What a run reads when: its sources and their weights, tokens per block, and phases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_chameleon.data.mixture.stream import Cursor

_FRACTION_BITS = 52
_ONE = 1 << _FRACTION_BITS


@dataclass(frozen=True)
class SourceWeight:
    """One source of a stage."""

    key: str
    """Identifies the source."""
    weight: float
    """Above 0; the weights of a stage need not sum to 1."""
    epochs: int | float | None = None
    """How often its documents may be read at most; None for no limit. A fraction is exact to a
    token."""


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

    def of_stage(self, stage: int) -> dict[str, tuple[float, int | float | None]]:
        """Weight and limit of epochs of each source of a stage; the weights sum to 1."""
        first = sum(source.weight for source in self.stage1)
        keep = 1.0 if stage == 1 else 1 - self.stage2_share
        found = {s.key: (keep * s.weight / first, s.epochs) for s in self.stage1}
        if stage == 2:
            second = sum(source.weight for source in self.stage2)
            found |= {s.key: (self.stage2_share * s.weight / second, s.epochs) for s in self.stage2}
        return {key: value for key, value in found.items() if value[0] > 0}


@dataclass(frozen=True)
class TokensPerBlock:
    """How many tokens a source gives to each block: a fixed-point number with 52 fractional bits.

    The share of a source is rarely a whole number of tokens per block. If it were rounded, a long
    run would drift away from its weights. So the fraction is kept, and a block takes the tokens
    between two positions that are rounded down: some blocks take one token more than others, and
    all of them together are exact to a token. 52 bits are the precision of a float's fraction, and
    integers do not overflow in Python, so this holds for a run of any length.

    Example: three quarters of blocks of 1,001 tokens are 750.75 tokens per block. The first block
    takes 750 of them, and each of the next three 751.

        >>> rate = TokensPerBlock.of_share(0.75, 1001)
        >>> [rate.before(block) for block in range(5)]
        [0, 750, 1501, 2252, 3003]
        >>> rate.whole_tokens
        750
        >>> rate.blocks_within(3002), rate.blocks_within(3003)
        (3, 4)
    """

    units: int
    """Tokens per block in units of 2^-52."""

    @classmethod
    def of_share(cls, share: float, tokens: int) -> "TokensPerBlock":
        """A share, in [0, 1], of a block of so many tokens."""
        return cls(round(share * _ONE) * tokens)

    @classmethod
    def whole(cls, tokens: int) -> "TokensPerBlock":
        """A whole number of tokens per block."""
        return cls(tokens * _ONE)

    @property
    def whole_tokens(self) -> int:
        """Tokens per block, rounded down: what the first block takes."""
        return self.before(1)

    @property
    def is_whole(self) -> bool:
        """Whether every block takes the same number of tokens."""
        return self.units % _ONE == 0

    def before(self, block: int) -> int:
        """Tokens that all blocks before this one take together."""
        return self.units * block >> _FRACTION_BITS

    def blocks_within(self, tokens: int) -> int:
        """The largest number of blocks that take at most so many tokens together."""
        return ((tokens + 1) * _ONE - 1) // self.units


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
    ends_run: bool = False
    """Whether it is a single block with which all sources are exhausted."""

    def position(self, key: str, block: int) -> int:
        """Tokens that the phase has taken from a source before a block."""
        return self.rates[key].before(block)

    def shares(self) -> dict[str, float]:
        """Share of each source in the tokens of the phase; they sum to 1."""
        total = sum(rate.units for rate in self.rates.values())
        return {key: rate.units / total for key, rate in self.rates.items()}


def plan_rates(
    shares: Mapping[str, float],
    left: Mapping[str, int | None],
    capacity_of: Callable[[Mapping[str, float]], int],
) -> tuple[dict[str, TokensPerBlock], int | None]:
    """Choose what each source gives to the next blocks.

    A source that has less left than a block should take of it gives all it has, to a single block,
    and the other sources fill the rest of that block.

    Args:
        shares: Weight of each source by its key, above 0; they need not sum to 1.
        left: Tokens that each source may still give; None for no limit.
        capacity_of: Tokens that a block of some of these sources can certainly hold.

    Returns:
        The rate of each source, and for how many blocks it can be kept; None for ever.
    """
    capacity = capacity_of(shares)
    rates = split(shares, capacity)
    given: dict[str, int] = {}
    while short := {
        key: tokens
        for key, rate in rates.items()
        if key not in given and (tokens := left[key]) is not None and tokens < rate.whole_tokens
    }:
        given |= short
        rates = {key: TokensPerBlock.whole(tokens) for key, tokens in given.items()}
        rest = {key: weight for key, weight in shares.items() if key not in given}
        if rest:
            room = max(0, capacity - sum(given.values()))
            rates |= split(rest, min(room, capacity_of(rest) * room // capacity))
    if given:
        return rates, 1
    blocks = [
        rate.blocks_within(tokens)
        for key, rate in rates.items()
        if (tokens := left[key]) is not None
    ]
    return rates, max(1, min(blocks)) if blocks else None


def split(shares: Mapping[str, float], tokens: int) -> dict[str, TokensPerBlock]:
    """Divide the tokens of a block in proportion to the weights."""
    total = sum(shares.values())
    return {key: TokensPerBlock.of_share(weight / total, tokens) for key, weight in shares.items()}
