"""How many tokens each source gives to a block of a mixture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FRACTION_BITS = 52
_ONE = 1 << _FRACTION_BITS


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

    def before(self, block: int) -> int:
        """Tokens that all blocks before this one take together."""
        return self.units * block >> _FRACTION_BITS

    def blocks_within(self, tokens: int) -> int:
        """The largest number of blocks that take at most so many tokens together."""
        return ((tokens + 1) * _ONE - 1) // self.units


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
    rates = _split(shares, capacity)
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
            rates |= _split(rest, min(room, capacity_of(rest) * room // capacity))
    if given:
        return rates, 1
    blocks = [
        rate.blocks_within(tokens)
        for key, rate in rates.items()
        if (tokens := left[key]) is not None
    ]
    return rates, max(1, min(blocks)) if blocks else None


def _split(shares: Mapping[str, float], tokens: int) -> dict[str, TokensPerBlock]:
    """Divide the tokens of a block in proportion to the weights."""
    total = sum(shares.values())
    return {key: TokensPerBlock.of_share(weight / total, tokens) for key, weight in shares.items()}
