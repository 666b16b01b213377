"""JPEG and WebP at a number of bytes, which is fewer than they are made for.

At so few bytes a smaller picture, enlarged afterwards, is better than the lowest quality. So each
picture is coded at several sizes and qualities, and the one nearest to it that fits is taken.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

SHRINKINGS = (1, 2, 4, 8)
QUALITIES = (1, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 75, 90)

Coder = Callable[[Image.Image, int], bytes]
Counter = Callable[[bytes], int]


def jpeg(image: Image.Image, quality: int) -> bytes:
    """A baseline JPEG with half the colour resolution and Huffman tables of its own."""
    return _saved(image, "JPEG", quality=quality, optimize=True, subsampling="4:2:0")


def webp(image: Image.Image, quality: int) -> bytes:
    """A lossy WebP, with the slowest and best search."""
    return _saved(image, "WEBP", quality=quality, method=6)


def scan_bytes(data: bytes) -> int:
    """Bytes of a JPEG's scan alone: no markers, no tables of quantisation or Huffman codes."""
    place = 2
    while data[place + 1] != 0xDA:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data) - place - 2  # the end marker


def payload_bytes(data: bytes) -> int:
    """Bytes of a WebP's picture alone: no RIFF header, no chunk header, no size of the frame."""
    return len(data) - 20 - 10


def best_within(image: Image.Image, budget: int, coder: Coder, count: Counter) -> np.ndarray | None:
    """The picture nearest to the image, by squared error, whose bytes are at most the budget.

    Returns:
        RGB, uint8, of the image's size; None if nothing fits.
    """
    original = np.asarray(image).astype(np.float64)
    best: tuple[float, np.ndarray] | None = None
    for shrinking in SHRINKINGS:
        small = image.resize(
            (image.width // shrinking, image.height // shrinking), Image.Resampling.LANCZOS
        )
        for quality in QUALITIES:
            data = coder(small, quality)
            if count(data) > budget:
                break
            with Image.open(io.BytesIO(data)) as decoded:
                pixels = np.asarray(
                    decoded.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
                )
            error = float(np.square(pixels - original).mean())
            if best is None or error < best[0]:
                best = (error, pixels)
    return best[1] if best else None


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
