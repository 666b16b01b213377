"""Shuffling without a table: a keyed permutation of [0, size), computed place by place.

A Feistel network over the smallest even number of bits that holds ``size`` permutes a range of up
to four times that size. A place that lands outside [0, size) is sent through the network again
until it lands inside (cycle walking), so the result is still a permutation. This needs no memory
and no preparation, whatever the size.

Random bits come from BLAKE2b and ``PCG64.random_raw``. These do not change with the version of
numpy, as the methods of ``np.random.Generator`` may, so a run can be continued after an upgrade.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
"""

import hashlib
import struct

import numpy as np

_ROUNDS = 6
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
"""Multipliers of MurmurHash3's 64-bit finalizer."""


class Permutation:
    """A permutation of [0, size) that depends only on the size and the key.

    Args:
        size: At least 1, at most 2^62.
        key: Integers in [0, 2^64).
    """

    def __init__(self, size: int, *key: int) -> None:
        assert 1 <= size <= 1 << 62
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=8 * _ROUNDS)
        self._keys = np.frombuffer(digest.digest(), dtype="<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The values at these places: int64 in [0, size), of the same shape."""
        values = np.asarray(places).astype(np.uint64)
        limit = np.uint64(self.size)
        values = self._encipher(values)
        while (outside := values >= limit).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            mixed = right ^ key  # unsigned arithmetic wraps, as it should
            mixed = (mixed ^ (mixed >> np.uint64(33))) * _MIX1
            mixed = (mixed ^ (mixed >> np.uint64(33))) * _MIX2
            mixed ^= mixed >> np.uint64(33)
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._shift) | right


def shuffled(size: int, *key: int) -> np.ndarray:
    """A permutation of a small range as an array: int64 [size]; ``key`` holds integers >= 0."""
    keys = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(size)
    return np.argsort(keys, kind="stable")


def uniform(*key: int) -> float:
    """A number in [0, 1) that depends only on the key, which holds integers in [0, 2^64)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
