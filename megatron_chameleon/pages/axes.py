"""Axes of charts: ranges, ticks and their labels, and fewer points that look the same."""

import math
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 2000
"""Of a curve on a page."""
_STEPS = (1, 2, 2.5, 5, 10, 20, 50)
_ABOUT = 1 + 1e-9
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Axis:
    """Turns values into places from 0 to 1."""

    low: float
    high: float
    is_log: bool

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """The place of each value; NaN where a logarithmic axis has none."""
        values = np.asarray(values, dtype=np.float64)
        if not self.is_log:
            return (values - self.low) / (self.high - self.low)
        logs = np.log(np.where(values > _SMALLEST, values, np.nan))
        return (logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self, most: int) -> list[float]:
        """Round values within the axis, at most so many."""
        if self.is_log and self.high / self.low > 8:
            return _log_ticks(self.low, self.high, most)
        return _ticks(self.low, self.high, most)


def axis_of(values: np.ndarray, is_log: bool, is_tight: bool = False) -> Axis:
    """The axis on which all of some values fit. If there are none, it goes from 0 to 1.

    Args:
        values: Finite numbers. A logarithmic axis ignores those that are not positive; if none is,
            the axis is linear.
        is_log: Whether the axis is logarithmic.
        is_tight: Whether it ends at the outermost values, as an axis of steps does.
    """
    positive = values[values > _SMALLEST] if is_log else values
    if is_log and not len(positive):
        return axis_of(values, False, is_tight)
    if not len(positive):
        return Axis(0.0, 1.0, False)
    low, high = float(positive.min()), float(positive.max())
    if is_log:
        if high / low < 1 + 1e-12:
            return Axis(low / 2, high * 2, True)
        margin = 1.0 if is_tight else (high / low) ** 0.04
        return Axis(low / margin, high * margin, True)
    if high - low <= max(_SMALLEST, 1e-12 * abs(high)):
        margin = abs(low) / 2 or 0.5
        return Axis(low - margin, high + margin, False)
    margin = 0.0 if is_tight else 0.04 * (high - low)
    if 0 <= low < 0.3 * high and not is_tight:
        return Axis(0.0, high + margin, False)
    return Axis(low - margin, high + margin, False)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    for step in _STEPS:
        size = step * power
        first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
        if last - first + 1 <= most:
            return [number * size for number in range(first, last + 1)]
    return []


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = range(first, last + 1)
    if len(powers) < 3:
        found = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
        found = [
            value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)
        ]
        return found[:: -(-len(found) // most)] if found else []
    stride = -(-len(powers) // most)
    return [10.0**power for power in powers if power % stride == 0]


def tick_label(value: float) -> str:
    """A number for a tick: short, and exact for round numbers.

    >>> [tick_label(value) for value in (0, 2500, 1.5e6, 0.05, 1e-6, 3e9)]
    ['0', '2,500', '1.5M', '0.05', '1e-06', '3G']
    """
    size = abs(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.4g}{unit}"
    return f"{value:,.5g}" if size >= 1e3 else f"{value:.4g}"


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Choose points of a curve such that it looks the same: the extremes of each piece.

    Args:
        x: Places along the axis, ascending, float [points].
        y: Values, float [points]; NaN is never chosen.
        most: Largest number of points, 6 or more.

    Returns:
        Indices of the chosen points, ascending, int64; all finite ones if they are few enough. The
        first and last point are among them, and the lowest and highest of each piece: the axis is
        divided into ``most // 2 - 1`` pieces of equal width.
    """
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(known) <= most:
        return known
    x, y = x[known], y[known]
    pieces = most // 2 - 1
    width = x[-1] - x[0]
    share = (x - x[0]) / width if width > 0 else np.linspace(0, 1, len(x))
    piece = np.minimum((share * pieces).astype(np.int64), pieces - 1)
    order = np.lexsort((y, piece))
    borders = np.flatnonzero(np.diff(piece[order])) + 1
    lowest = order[np.concatenate([[0], borders])]
    highest = order[np.concatenate([borders - 1, [len(order) - 1]])]
    return known[np.unique(np.concatenate([[0, len(x) - 1], lowest, highest]))]
