"""Decides which documents are kept, from their measured values.

The filters run in the order of ``FILTERS``. Each one sees what the ones before it have left: a
duplicate of a dropped document is no duplicate, and "the nearest N" are N of what is left. Beside
what it drops first, each filter is also asked what it would drop alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.filter.duplicates import (
    SimilarPictures,
    SimilarTexts,
    known_values,
    same_pictures,
    same_values,
    similar_pictures,
)
from megatron_chameleon.data.filter.measures.options import BEST, FilterOptions
from megatron_chameleon.data.filter.measures.table import Table


@dataclass
class Judged:
    """What one filter did."""

    name: str
    setting: str
    """Its values, for people."""
    seen: int
    """Documents that the filters before it have left."""
    dropped: int
    alone: int
    """Documents that it would drop if it were the only one."""


@dataclass
class Verdict:
    """What becomes of each document."""

    filters: list[Judged]
    dropped_by: np.ndarray
    """Number of the filter, int8 [documents]; -1 for documents that are kept."""
    reasons: list[Callable[[int], str]]
    """For each filter: why it drops a document, by its number."""

    @property
    def kept(self) -> np.ndarray:
        return self.dropped_by < 0

    def reason(self, document: int) -> str:
        """Why a document is dropped."""
        return self.reasons[self.dropped_by[document]](document)


class _Filter:
    """One filter.

    Args:
        name: For tables.
        setting: Its values.
        drops: Given which documents are left, bool [documents]: which of them it drops, and for
            duplicates the documents that they repeat, else None.
        reason: Why it drops a document, given the number of the one that it repeats, or -1.
    """

    def __init__(
        self,
        name: str,
        setting: str,
        drops: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]],
        reason: Callable[[int, int], str],
    ) -> None:
        self.name, self.setting, self.drops, self.reason = name, setting, drops, reason


def judge(
    options: FilterOptions,
    table: Table,
    against: Table | None,
    entries: list[str],
    languages: list[str],
    where: Callable[[int, bool], str],
) -> Verdict:
    """Decide what is kept.

    Args:
        options: The filters.
        table: The documents.
        against: Those of ``--against``.
        entries: Of the safety list.
        languages: The labels of languages.
        where: Names a document by its number, or one of ``against``.
    """
    filters = _Filters(options, table, against, entries, languages, where).all()
    dropped_by = np.full(len(table), -1, dtype=np.int8)
    every = np.ones(len(table), dtype=bool)
    judged, reasons = [], []
    for number, one in enumerate(filters):
        left = dropped_by < 0
        dropped, partners = one.drops(left)
        dropped = dropped & left
        alone = dropped if left.all() else one.drops(every)[0]
        dropped_by[dropped] = number
        judged.append(
            Judged(one.name, one.setting, int(left.sum()), int(dropped.sum()), int(alone.sum()))
        )
        reasons.append(_reason_of(one, partners))
    return Verdict(judged, dropped_by, reasons)


def _reason_of(one: _Filter, partners: np.ndarray | None) -> Callable[[int], str]:
    return lambda i: one.reason(i, -1 if partners is None else int(partners[i]))


class _Filters:
    """The filters that the options ask for, in order."""

    def __init__(
        self,
        options: FilterOptions,
        table: Table,
        against: Table | None,
        entries: list[str],
        languages: list[str],
        where: Callable[[int, bool], str],
    ) -> None:
        self.options, self.table, self.against = options, table, against
        self.entries, self.languages, self.where = entries, languages, where

    def all(self) -> list[_Filter]:
        return [
            *self._blocklist(),
            *self._lengths(),
            *self._language(),
            *self._sizes(),
            *self._score(),
            *self._against(),
            *self._duplicates(),
            *self._nearest(),
        ]

    # Values of one document

    def _row(
        self, name: str, setting: str, dropped: np.ndarray, reason: Callable[[int], str]
    ) -> _Filter:
        return _Filter(name, setting, lambda _: (dropped, None), lambda i, _: reason(i))

    def _blocklist(self) -> list[_Filter]:
        if not self.entries:
            return []
        blocked = self.table.columns["blocked"]
        setting = f"{len(self.entries):,} entries" if len(self.entries) > 1 else "1 entry"
        return [
            self._row(
                "safety list", setting, blocked >= 0, lambda i: f"has {self.entries[blocked[i]]!r}"
            )
        ]

    def _between(
        self,
        name: str,
        values: np.ndarray,
        low: float | None,
        high: float | None,
        unit: str,
        counts: np.ndarray | None = None,
        top: np.ndarray | None = None,
    ) -> list[_Filter]:
        """Drop what is below ``low`` or above ``high``.

        Args:
            name: Of the filter.
            values: [documents]
            low: None for no limit.
            high: None for no limit.
            unit: Behind a value.
            counts: Documents with 0 here are kept; None: all are judged.
            top: What ``high`` limits, if it is something else.
        """
        if low is None and high is None:
            return []
        upper = values if top is None else top
        below = np.zeros(len(values), bool) if low is None else values < low
        above = np.zeros(len(values), bool) if high is None else upper > high
        if counts is not None:
            below, above = below & (counts > 0), above & (counts > 0)
        limits = [f"at least {low:,g}" if low is not None else ""]
        limits.append(f"at most {high:,g}" if high is not None else "")

        def reason(i: int) -> str:
            value = values[i] if below[i] else upper[i]
            return f"{value:,.4g} {unit}".rstrip() if value < 1e4 else f"{value:,.0f} {unit}"

        setting = ", ".join(filter(None, limits))
        return [self._row(name, setting, below | above, reason)]

    def _lengths(self) -> list[_Filter]:
        found = []
        for name in ("characters", "words", "tokens"):
            low, high = (getattr(self.options, f"{end}_{name}") for end in ("min", "max"))
            found += self._between(name, self.table.columns[name], low, high, name)
        return found

    def _language(self) -> list[_Filter]:
        if not self.options.languages:
            return []
        columns, least = self.table.columns, self.options.min_language_probability
        numbers = [self.languages.index(name) for name in self.options.languages]
        has_letters = columns["language"] >= 0
        dropped = has_letters & ~np.isin(columns["language"], numbers)
        dropped |= has_letters & (columns["probability"] < least)
        setting = ", ".join(self.options.languages)
        setting += f", probability at least {least:g}" if least else ""

        def reason(i: int) -> str:
            label = self.languages[columns["language"][i]]
            return f"{label}, probability {columns['probability'][i]:.2f}"

        return [self._row("language", setting, dropped, reason)]

    def _sizes(self) -> list[_Filter]:
        columns, options = self.table.columns, self.options
        found = []
        for name in ("width", "height"):
            low, high = (getattr(options, f"{end}_{name}") for end in ("min", "max"))
            values, top = columns[f"min_{name}"], columns[f"max_{name}"]
            found += self._between(
                f"image {name}", values, low, high, "pixels", columns["images"], top
            )
        ratios = columns["aspect_ratio"]
        most = options.max_aspect_ratio
        return found + self._between("aspect ratio", ratios, None, most, "to 1", columns["images"])

    def _score(self) -> list[_Filter]:
        options, scores = self.options, self.table.columns["score"]
        if options.min_score is None and options.max_score is None:
            return []
        missing = np.isnan(scores) & (self.table.columns["images"] > 0)
        low = -np.inf if options.min_score is None else options.min_score
        high = np.inf if options.max_score is None else options.max_score
        dropped = (scores < low) | (scores > high)  # false for NaN
        if options.missing_score == "drop":
            dropped = dropped | missing
        limits = [f"at least {low:g}" if np.isfinite(low) else ""]
        limits += [f"at most {high:g}" if np.isfinite(high) else ""]
        return [
            self._row(
                "aesthetic score",
                ", ".join(filter(None, limits)),
                dropped,
                lambda i: "no score" if np.isnan(scores[i]) else f"score {scores[i]:.4g}",
            )
        ]

    # Several documents

    def _order(self, left: np.ndarray) -> np.ndarray:
        """The documents that are left, those first that stay if they are duplicates."""
        places = np.flatnonzero(left)
        if self.options.keep != BEST:
            return places
        scores = self.table.columns["score"][places]
        return places[np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")]

    def _partners(
        self, name: str, setting: str, find: Callable[[np.ndarray], np.ndarray], text: str
    ) -> _Filter:
        """A filter that drops what repeats a document that is kept."""

        def drops(left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            partners = find(self._order(left))
            return partners >= 0, partners

        return _Filter(name, setting, drops, lambda i, other: f"{text} {self.where(other, False)}")

    def _duplicates(self) -> list[_Filter]:
        options, table, total = self.options, self.table, len(self.table)
        columns, found = table.columns, list[_Filter]()
        stays = "the best one stays" if options.keep == BEST else "the first one stays"
        if options.duplicates:
            find = lambda order: same_values(columns["hash"], order, total)
            found.append(self._partners("duplicates", stays, find, "same as"))
        if options.duplicate_images:
            find = lambda order: same_pictures(table.pixels, table.offsets, order, total)
            found.append(self._partners("duplicate images", stays, find, "has a picture of"))
        if (least := options.near_duplicates) is not None:
            texts = SimilarTexts(least)
            find = lambda order: texts.within(table.signatures, columns["group"], order, total)
            setting = f"similarity at least {least:g}, {stays}"
            found.append(self._partners("near duplicates", setting, find, "text similar to"))
        if (bits := options.near_images) is not None:
            find = lambda order: similar_pictures(
                table.phashes, table.has_phash, table.offsets, order, bits, total
            )
            setting = f"at most {bits} of 64 bits differ, {stays}"
            found.append(self._partners("near images", setting, find, "picture similar to one of"))
        return found

    def _against(self) -> list[_Filter]:
        if self.against is None:
            return []
        partners = self._known()
        return [
            _Filter(
                "held-out documents",
                ", ".join(self.options.against),
                lambda _: (partners >= 0, partners),
                lambda i, other: f"repeats {self.where(other, True)}",
            )
        ]

    def _known(self) -> np.ndarray:
        """For each document, the one of ``against`` that it repeats; -1 if none."""
        table, known, options = self.table, self.against, self.options
        assert known is not None
        partners = known_values(table.columns["hash"], known.columns["hash"])
        matches = [
            known_values(table.columns["asked_hash"], known.columns["asked_hash"]),
        ]
        if options.near_duplicates is not None:
            texts = SimilarTexts(options.near_duplicates)
            for name, prefix in (("signatures", ""), ("asked_signatures", "asked_")):
                mine, theirs = getattr(table, name), getattr(known, name)
                groups = (t.columns[f"{prefix}group"] for t in (table, known))
                own, other = groups
                matches.append(texts.among(mine, own, theirs, other))
        if options.duplicate_images:
            owners = np.repeat(np.arange(len(known)), np.diff(known.offsets))
            places = known_values(table.pixels, known.pixels)
            matches.append(
                self._of_pictures(np.where(places >= 0, owners[places], -1))
                if len(owners)
                else np.full(len(table), -1)
            )
        if options.near_images is not None:
            matches.append(self._of_pictures(self._similar_known(known)))
        for match in matches:
            partners = np.where(partners >= 0, partners, match)
        return partners

    def _similar_known(self, known: Table) -> np.ndarray:
        """For each picture, the document of ``against`` that has a similar one; -1 if none."""
        index = SimilarPictures(int(self.options.near_images or 0))
        for document in range(len(known)):
            for place in range(known.offsets[document], known.offsets[document + 1]):
                if known.has_phash[place]:
                    index.add(int(known.phashes[place]), document)
        pairs = zip(self.table.phashes.tolist(), self.table.has_phash.tolist(), strict=True)
        return np.array([index.find(v) if usable else -1 for v, usable in pairs], dtype=np.int64)

    def _of_pictures(self, partners: np.ndarray) -> np.ndarray:
        """The largest value of each document's pictures; -1 if it has none."""
        found = np.full(len(self.table), -1, dtype=np.int64)
        owners = np.repeat(np.arange(len(self.table)), np.diff(self.table.offsets))
        np.maximum.at(found, owners, partners)
        return found

    def _nearest(self) -> list[_Filter]:
        options, columns = self.options, self.table.columns
        if options.nearest is None:
            return []
        has_images = columns["images"] > 0
        found = []
        if (factor := options.nearest_factor) is not None:
            far = has_images & (columns["factor"] > factor)
            setting = f"within a factor of {factor:g} of {options.nearest}"
            found.append(self._row("size", setting, far, lambda i: f"{self._size(i)}"))
        if (most := options.keep_nearest) is not None:

            def drops(left: np.ndarray) -> tuple[np.ndarray, None]:
                places = np.flatnonzero(left & has_images)
                order = np.argsort(columns["distance"][places], kind="stable")
                dropped = np.zeros(len(left), dtype=bool)
                dropped[places[order[most:]]] = True
                return dropped, None

            setting = f"the {most:,} nearest to {options.nearest}"
            found.append(_Filter("nearest size", setting, drops, lambda i, _: self._size(i)))
        return found

    def _size(self, i: int) -> str:
        columns = self.table.columns
        low = f"{columns['min_width'][i]} x {columns['min_height'][i]}"
        if columns["images"][i] == 1:
            return f"{low} pixels"
        high = f"{columns['max_width'][i]} x {columns['max_height'][i]}"
        return f"pictures of {low} to {high} pixels"
