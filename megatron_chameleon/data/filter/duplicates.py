"""Which documents are the same as, or similar to, a better one.

Each function goes through documents in an order, best first. One that equals or resembles a
document before it that was kept is dropped, so a chain of small differences does not drop a
document that resembles none of those that stay.

The functions return, for each document, the number of the one that it repeats, or -1.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from megatron_chameleon.data.filter.measures.texts import bands_for

MOST_COMPARED = 2000
"""Kept documents of one band that a text is compared with; more are passed over."""
_HASH_BITS = 64


def same_values(values: np.ndarray, order: np.ndarray, total: int) -> np.ndarray:
    """Documents with equal values.

    Args:
        values: A hash of each document, uint64 [total].
        order: The documents to look at, best first.
        total: Number of all documents.
    """
    partners = np.full(total, -1, dtype=np.int64)
    if len(order):
        _, first, inverse = np.unique(values[order], return_index=True, return_inverse=True)
        found = order[first[inverse.ravel()]]
        partners[order] = np.where(found == order, -1, found)
    return partners


def known_values(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each value, its place among others; -1 if it is not there."""
    if not len(known):
        return np.full(len(values), -1, dtype=np.int64)
    sorted_known, places = np.unique(known, return_index=True)
    found = np.searchsorted(sorted_known, values).clip(max=len(sorted_known) - 1)
    return np.where(sorted_known[found] == values, places[found], -1)


def same_pictures(
    pixels: np.ndarray, offsets: np.ndarray, order: Iterable[int], total: int
) -> np.ndarray:
    """Documents with a picture that a kept one has.

    Args:
        pixels: Hash of each picture, uint64 [pictures].
        offsets: Where the pictures of each document begin, int64 [total + 1].
        order: The documents to look at, best first.
        total: Number of all documents.
    """
    partners = np.full(total, -1, dtype=np.int64)
    values, counts = np.unique(pixels, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    kept: dict[int, int] = {}
    for document in order:
        own = pixels[offsets[document] : offsets[document + 1]].tolist()
        candidates = [value for value in own if value in repeated]
        found = [kept[value] for value in candidates if value in kept]
        if found:
            partners[document] = found[0]
        else:
            kept.update(dict.fromkeys(candidates, document))
    return partners


class SimilarTexts:
    """Kept documents, found by their MinHash signatures.

    Args:
        threshold: The share of equal values from which two texts are similar.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._bands, self._rows = bands_for(threshold)

    def within(
        self, signatures: np.ndarray, groups: np.ndarray, order: np.ndarray, total: int
    ) -> np.ndarray:
        """Documents that resemble a kept one.

        Args:
            signatures: uint32 [total, permutations]; zeros for a document without words.
            groups: Documents of different groups are not compared, uint64 [total]. The group is a
                hash of the pictures: the caption "a dog" of two pictures is no duplicate.
            order: The documents to look at, best first.
            total: Number of all documents.
        """
        partners = np.full(total, -1, dtype=np.int64)
        order = order[signatures[order].any(axis=1)] if len(order) else order
        if not len(order):
            return partners
        buckets = self._shared_buckets(signatures, groups, order)
        kept: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
            document = int(order[place])
            own = [bucket for bucket in buckets[place].tolist() if bucket >= 0]
            found = self._nearest(signatures, document, {c for b in own for c in kept[b]})
            if found >= 0:
                partners[document] = found
                continue
            for bucket in own:
                if len(kept[bucket]) < MOST_COMPARED:
                    kept[bucket].append(document)
        return partners

    def among(
        self,
        signatures: np.ndarray,
        groups: np.ndarray,
        known: np.ndarray,
        known_groups: np.ndarray,
    ) -> np.ndarray:
        """For each document, one of another set that it resembles; -1 if there is none."""
        joined = np.concatenate([known, signatures])
        all_groups = np.concatenate([known_groups, groups])
        order = np.flatnonzero(joined.any(axis=1))
        partners = np.full(len(signatures), -1, dtype=np.int64)
        if not len(order):
            return partners
        buckets = self._shared_buckets(joined, all_groups, order)
        table: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
            own = [bucket for bucket in buckets[place].tolist() if bucket >= 0]
            document = int(order[place])
            if document < len(known):
                for bucket in own:
                    if len(table[bucket]) < MOST_COMPARED:
                        table[bucket].append(document)
            else:
                near = {c for b in own for c in table.get(b, ())}
                partners[document - len(known)] = self._nearest(joined, document, near)
        return partners

    def _nearest(self, signatures: np.ndarray, document: int, candidates: set[int]) -> int:
        """The candidate that a document resembles most, the earlier of two; -1 if none does."""
        if not candidates:
            return -1
        others = np.array(sorted(candidates), dtype=np.int64)
        similarity = (signatures[others] == signatures[document]).mean(axis=1)
        best = int(similarity.argmax())
        return int(others[best]) if similarity[best] >= self.threshold else -1

    def _shared_buckets(
        self, signatures: np.ndarray, groups: np.ndarray, order: np.ndarray
    ) -> np.ndarray:
        """The bucket of each band of each document, int64 [order, bands]; -1 if nobody shares it.

        Two documents share a bucket if they are of one group and agree in all values of a band.
        """
        found = np.empty((len(order), self._bands), dtype=np.int64)
        used = 0
        for band in range(self._bands):
            columns = slice(band * self._rows, (band + 1) * self._rows)
            keys = _mixed(signatures[order, columns].astype(np.uint64), groups[order])
            _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            inverse = inverse.ravel()
            found[:, band] = np.where(counts[inverse] > 1, inverse + used, -1)
            used += len(counts)
        return found


def _mixed(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A hash of each row and its group, uint64; a false match only costs a comparison."""
    factor, mixed = np.uint64(0x9E3779B97F4A7C15), groups.copy()
    for column in values.T:
        mixed = (mixed ^ column) * factor
        mixed ^= mixed >> np.uint64(29)
    return mixed


def similar_pictures(
    phashes: np.ndarray,
    usable: np.ndarray,
    offsets: np.ndarray,
    order: Iterable[int],
    most_bits: int,
    total: int,
) -> np.ndarray:
    """Documents with a picture that resembles one of a kept document.

    Args:
        phashes: Perceptual hash of each picture, uint64 [pictures].
        usable: Whether it has one, bool [pictures].
        offsets: Where the pictures of each document begin, int64 [total + 1].
        order: The documents to look at, best first.
        most_bits: Bits that may differ.
        total: Number of all documents.
    """
    partners = np.full(total, -1, dtype=np.int64)
    index = SimilarPictures(most_bits)
    for document in order:
        places = range(offsets[document], offsets[document + 1])
        own = [int(phashes[place]) for place in places if usable[place]]
        found = next((f for f in map(index.find, own) if f >= 0), -1)
        partners[document] = found
        if found < 0:
            for value in own:
                index.add(value, int(document))
    return partners


class SimilarPictures:
    """Perceptual hashes, found by others that differ in a few bits.

    A hash is cut into one more pieces than bits may differ: at least one piece is then equal.
    """

    def __init__(self, most_bits: int) -> None:
        self._most_bits = most_bits
        borders = np.linspace(0, _HASH_BITS, most_bits + 2).astype(int).tolist()
        self._pieces = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(borders)]
        self._tables: list[dict[int, list[int]]] = [{} for _ in self._pieces]
        self._values: list[int] = []
        self._documents: list[int] = []

    def add(self, value: int, document: int) -> None:
        """Add a hash of a document."""
        for table, (shift, mask) in zip(self._tables, self._pieces, strict=True):
            table.setdefault(value >> shift & mask, []).append(len(self._values))
        self._values.append(value)
        self._documents.append(document)

    def find(self, value: int) -> int:
        """The first document that was added with a hash so similar; -1 if there is none."""
        found = len(self._values)
        for table, (shift, mask) in zip(self._tables, self._pieces, strict=True):
            for place in table.get(value >> shift & mask, ()):
                if place >= found:
                    break
                if (self._values[place] ^ value).bit_count() <= self._most_bits:
                    found = place
                    break
        return self._documents[found] if found < len(self._values) else -1
