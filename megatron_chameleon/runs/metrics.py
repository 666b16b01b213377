"""The metrics of a run as columns of numbers.

``metrics.jsonl`` has one JSON object per step. A resumed run may have some steps twice: the last
record of a step counts. A column needs 12 bytes per step, so a run of a million steps with twenty
columns is read in 240 MB.
"""

import math
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chameleon.checkpoint.state.line import METRICS_FILE
from megatron_chameleon.runs.lines import BrokenLines, read_objects

LARGEST_VALUE = 1e30
"""Larger numbers become NaN: axes could not be divided by them."""
MOST_KEYS = 5000
"""A run has some dozens, and a few per data source; a file with more keys is not a run's."""


class Metrics:
    """The records of a run, one per step, in the order of the steps.

    Attributes:
        steps: Each step that has a record, ascending, int64 [steps].
        broken: The lines that were passed over.
        not_numbers: The first step and value of each key that has values that are not numbers.
    """

    def __init__(self, broken: BrokenLines) -> None:
        self.steps = np.zeros(0, dtype=np.int64)
        self.broken = broken
        self.not_numbers: dict[str, tuple[int, str]] = {}
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    @property
    def last_step(self) -> int:
        """The last step that has a record; 0 if none has."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def keys(self) -> list[str]:
        """The keys that have numbers, in the order of their first appearance."""
        return list(self._columns)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, int64 [points], and values, float64 [points], without steps that have no number.

        A value that is not finite, or far too large, is NaN.
        """
        if key not in self._columns:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        rows, values = self._columns[key]
        return self.steps[rows], values

    def finite(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Like ``series``, without NaN."""
        steps, values = self.series(key)
        is_finite = np.isfinite(values)
        return steps[is_finite], values[is_finite]

    def last(self, key: str) -> float | None:
        """The last finite value; None if there is none."""
        values = self.finite(key)[1]
        return float(values[-1]) if len(values) else None

    def at(self, key: str, steps: np.ndarray) -> np.ndarray:
        """The values at some steps, float64 [steps]; NaN where there is none."""
        known, values = self.series(key)
        if not len(known):
            return np.full(len(steps), np.nan)
        places = np.searchsorted(known, steps).clip(max=len(known) - 1)
        return np.where(known[places] == steps, values[places], np.nan)


def read_metrics(path: Path, wants: Callable[[str], bool] = lambda key: True) -> Metrics:
    """Read the metrics of a run.

    Args:
        path: A run folder, or a file of metrics.
        wants: Which keys to keep; a selection saves memory.

    Raises:
        DataError: There is no such file, or the disk cannot read it.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    broken = BrokenLines(file)
    return metrics_of(read_objects(file, broken), broken, wants)


def metrics_of(
    records: Iterable[dict[str, Any]],
    broken: BrokenLines | None = None,
    wants: Callable[[str], bool] = lambda key: True,
) -> Metrics:
    """The metrics of records, each of which has a whole number as ``step``."""
    reader = _ColumnReader(wants)
    for record in records:
        reader.add(record)
    metrics = Metrics(broken or BrokenLines(Path(METRICS_FILE)))
    reader.finish(metrics)
    return metrics


class _ColumnReader:
    """Turns records into columns: the rows that have a number, and the numbers."""

    def __init__(self, wants: Callable[[str], bool]) -> None:
        self._wants = wants
        self._steps = array("q")
        self._columns: dict[str, tuple[array[int], array[float]] | None] = {}
        self._not_numbers: dict[str, tuple[int, str]] = {}

    def add(self, record: dict[str, Any]) -> None:
        row, step = len(self._steps), record["step"]
        self._steps.append(step)
        for key, value in record.items():
            if key not in self._columns:
                if len(self._columns) >= MOST_KEYS:
                    continue
                is_kept = key == "step" or self._wants(key)
                self._columns[key] = (array("I"), array("d")) if is_kept else None
            column = self._columns[key]
            if column is None or value is None:
                continue
            if type(value) is not float and type(value) is not int:
                self._not_numbers.setdefault(key, (step, f"{value!r:.99}"))
                continue
            column[0].append(row)
            column[1].append(value if -LARGEST_VALUE <= value <= LARGEST_VALUE else math.nan)

    def finish(self, metrics: Metrics) -> None:
        steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else metrics.steps
        place = _places(steps)
        metrics.steps = steps if place is None else np.unique(steps)
        metrics.not_numbers = self._not_numbers
        for key, column in self._columns.items():
            if column is None or not column[0]:
                continue
            rows, values = np.frombuffer(column[0], np.uint32), np.frombuffer(column[1])
            if place is not None:
                rows, values = _moved(place[rows], values)
            if len(rows):
                metrics._columns[key] = rows, values
        self._columns = {}


def _places(steps: np.ndarray) -> np.ndarray | None:
    """The place of each record in the order of steps; -1 for those that a later one replaces.

    None if the records are in this order already.
    """
    if (np.diff(steps) > 0).all():
        return None
    unique, inverse = np.unique(steps, return_inverse=True)
    last = np.zeros(len(unique), dtype=np.int64)
    last[inverse] = np.arange(len(steps))  # the last assignment stays
    return np.where(last[inverse] == np.arange(len(steps)), inverse, -1)


def _moved(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = places >= 0
    order = np.argsort(places[kept], kind="stable")
    return places[kept][order], values[kept][order]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last ``window`` values, or over fewer at the start: [points].

    NaN is left out; where all values are NaN, so is their mean.
    """
    is_number = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_number, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_number)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    found = counts[ends] - counts[starts]
    return np.where(found > 0, (sums[ends] - sums[starts]) / np.maximum(found, 1), np.nan)
