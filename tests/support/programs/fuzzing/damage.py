"""Damage the bytes of a file as a disk, a broken transfer or an attacker does."""

import random

_NUMBERS = (0, 1, -1, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63)
_EDGE_BYTES = 300
"""Most formats keep their numbers this near to the beginning or to the end."""


def damage(content: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one to eight places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 8))):
        at = _place(len(data), rng)
        length = rng.choice((1, 2, 4, 8, rng.randint(1, 200)))
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + length] = rng.randbytes(length)
            case 3:
                data[at : at + length] = bytes(length)
            case 4:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                del data[at : at + length]
            case _:
                size = rng.choice((4, 8))
                number = rng.choice(_NUMBERS) & (2 ** (8 * size) - 1)
                data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(data)


def _place(size: int, rng: random.Random) -> int:
    at = rng.randrange(size) if size else 0
    if rng.random() >= 0.4:
        return at
    edge = at % _EDGE_BYTES
    return edge if rng.random() < 0.5 else max(0, size - 1 - edge)
