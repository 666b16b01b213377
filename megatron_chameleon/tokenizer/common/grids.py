"""The grids of image codes that a tokenizer folder can lay pictures out in.

A folder without shapes has one square grid. With a budget of codes it has one grid for each aspect
ratio that the budget allows, so that a picture keeps its shape:

    python -c "
    from megatron_chameleon.tokenizer.common.grids import Shapes
    shapes = Shapes(codes=1024, largest_ratio=4)
    print(len(shapes.grids), shapes.grid_of(640, 480))"
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from megatron_chameleon.errors import ConfigError, DataError

LARGEST_RATIO = 4.0
"""The default limit of how much longer one side of a grid may be than the other."""
BEYOND = 1 / 0.9
"""A picture that is longer than the longest grid by more than this factor is not cropped."""
MOST_BUDGET = 2**16
MOST_RATIO = 64.0

END_ROW = "<end_row>"
"""Name of the token that ends each row of codes in a vocabulary with grids."""
_GRID_NAME = re.compile(r"<grid_([1-9]\d{0,4})x([1-9]\d{0,4})>")


class Grid(NamedTuple):
    """Rows and columns of a picture's codes."""

    rows: int
    columns: int

    @property
    def codes(self) -> int:
        """Number of codes."""
        return self.rows * self.columns

    @property
    def name(self) -> str:
        """The name of its token: ``<grid_12x20>`` has 12 rows and 20 columns."""
        return f"<grid_{self.rows}x{self.columns}>"

    @property
    def elongation(self) -> float:
        """The longer side over the shorter one, at least 1."""
        return max(self) / min(self)

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def grid_of_name(name: str) -> Grid | None:
    """The grid that a token's name spells; None if it spells none."""
    match = _GRID_NAME.fullmatch(name)
    return Grid(int(match[1]), int(match[2])) if match else None


def square_grid(codes: int, where: str = "image codes") -> Grid:
    """The square grid of a number of codes.

    Raises:
        DataError: No square has so many codes.
    """
    side = math.isqrt(max(codes, 0))
    if side == 0 or side * side != codes:
        raise DataError(
            where,
            f"{codes} codes do not fill a square grid",
            "Pass the codes of a whole image; this vocabulary has no grids of other shapes",
        )
    return Grid(side, side)


@dataclass(frozen=True)
class Shapes:
    """The grids of a tokenizer folder, the tallest first and the widest last.

    They are the grids to which no row, or no column, could be added within the budget. The largest
    square and the most elongated grids are always among them, so that every budget covers pictures
    from squares to the largest ratio.

    Args:
        codes: The budget: the most codes of a picture.
        largest_ratio: How much longer one side may be than the other.
        grids: Those of a vocabulary, in any order; empty derives them from the budget.

    Raises:
        ConfigError: The budget is smaller than the narrowest grid that the ratio asks for, or a
            value is out of bounds.
    """

    codes: int = field(compare=False)
    largest_ratio: float = field(default=LARGEST_RATIO, compare=False)
    grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        if not self.grids:
            _check_budget(self.codes, self.largest_ratio)
        found = self.grids or _grids_within(self.codes, self.largest_ratio)
        order = sorted(found, key=lambda grid: (grid.columns / grid.rows, grid.rows))
        object.__setattr__(self, "grids", tuple(order))

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> "Shapes":
        """The shapes of a vocabulary that names these grids.

        Args:
            grids: At least one.
        """
        budget = max(grid.codes for grid in grids)
        return cls(budget, max(grid.elongation for grid in grids), tuple(grids))

    @property
    def largest_codes(self) -> int:
        """The codes of the largest grid, at most the budget."""
        return max(grid.codes for grid in self.grids)

    def is_beyond(self, width: int, height: int) -> bool:
        """Whether a picture is so elongated that the nearest grid would lose more than a tenth of
        it, because there is no longer grid."""
        tallest, widest = self.grids[0], self.grids[-1]
        too_wide = width * widest.rows / (height * widest.columns)
        too_tall = height * tallest.columns / (width * tallest.rows)
        return max(too_wide, too_tall) > BEYOND

    @cached_property
    def square(self) -> Grid:
        """The grid of a square picture."""
        return self.grid_of(1, 1)

    def grid_of(self, width: int, height: int) -> Grid:
        """The grid whose aspect ratio is nearest to a picture's; among equal ones, the largest.

        A picture that is more elongated than every grid gets the most elongated one.

        Args:
            width: In pixels or any other unit, at least 1.
            height: Likewise.
        """

        def stretch(grid: Grid) -> float:
            """How much longer the picture is than the grid in one direction, at least 1. Python
            rounds the quotient of two integers correctly, so a turned picture gets the turned
            grid."""
            across, down = width * grid.rows, height * grid.columns
            return max(across, down) / min(across, down)

        return min(self.grids, key=lambda grid: (stretch(grid), -grid.codes))


def _check_budget(codes: int, largest_ratio: float) -> None:
    if not 1 <= largest_ratio <= MOST_RATIO:
        raise ConfigError(
            "--largest-ratio",
            f"{largest_ratio:g} is outside [1, {MOST_RATIO:g}]",
            "Give the longest side of a picture over its shortest, such as 4",
        )
    least = math.ceil(largest_ratio)
    if codes < least:
        raise ConfigError(
            "--image-grids",
            f"a budget of {codes} codes is too small for a picture of {largest_ratio:g}:1, which "
            f"takes at least {least}",
            f"Use --image-grids {least} or more, or a smaller --largest-ratio",
        )
    if codes > MOST_BUDGET:
        what = f"a budget of {codes} codes is above {MOST_BUDGET}"
        raise ConfigError("--image-grids", what, f"Use --image-grids {MOST_BUDGET} or less")


def _grids_within(codes: int, largest_ratio: float) -> set[Grid]:
    """The grids to which no row or no column can be added, the largest square, and the most
    elongated grids, without which a budget may stop short of the ratio."""
    side = math.isqrt(codes)
    grids = {Grid(side, side)}
    longest = Grid(side, side)
    for rows in range(1, side + 1):
        columns = codes // rows
        within = Grid(rows, min(columns, math.floor(rows * largest_ratio)))
        longest = max(longest, within, key=lambda grid: (grid.elongation, grid.codes))
        grids |= {Grid(rows, columns)}
    for columns in range(side + 1, codes + 1):
        grids |= {Grid(codes // columns, columns)}
    grids |= {longest}
    grids |= {Grid(grid.columns, grid.rows) for grid in grids}
    return {grid for grid in grids if grid.elongation <= largest_ratio}
