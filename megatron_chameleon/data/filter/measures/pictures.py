"""What is measured of pictures: size, hash of the pixels, perceptual hash, score."""

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.filter.measures.blocklist import Blocklist
from megatron_chameleon.data.filter.measures.packages import needed
from megatron_chameleon.errors import ConfigError, DataError, one_line
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.pixels import digest_of_pixels, upright_rgb

Scorer = Callable[[Image.Image], float]
HASH_SIDE = 8
_FLAT_LEVELS = 2
"""A picture whose gray levels, made small, differ by no more is of one colour: the perceptual hash
of all such pictures is the same, and is not used."""


@dataclass(frozen=True)
class Picture:
    """The measured values of one picture, as a person sees it: upright."""

    width: int
    height: int
    pixels: int = 0
    """The first 64 bits of the SHA-256 of its pixels; 0 if not asked for."""
    phash: int | None = None
    """64 bits; None if not asked for, or if the picture is of one colour."""
    score: float = math.nan
    blocked: int = -1
    """The entry of the safety list that it is; -1: none."""


def load_scorer(name: str) -> Scorer:
    """The function that ``--scorer module:function`` names.

    Raises:
        ConfigError: It cannot be imported, or is not a function.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        what = f"{name} cannot be imported ({type(error).__name__}: {one_line(error)})"
        remedy = "Install its package, or put its folder into PYTHONPATH"
        raise ConfigError("--scorer", what, remedy) from error
    if not callable(found):
        raise ConfigError("--scorer", f"{name} is not a function", "Name a function")
    return found


class PictureMeasurer:
    """Opens and measures pictures.

    Args:
        pixels: Whether the hash of the pixels is needed.
        phash: Whether the perceptual hash is needed.
        scorer: ``module:function``; None for no score.
        blocklist: Its hashes are looked for.

    Raises:
        ConfigError: The scorer or a package is missing.
    """

    def __init__(self, pixels: bool, phash: bool, scorer: str | None, blocklist: Blocklist) -> None:
        self._pixels = pixels or blocklist.needs_pixels
        self._phash = phash or blocklist.needs_pixels
        self._blocklist = blocklist
        self._scorer = None if scorer is None else load_scorer(scorer)
        self._imagehash = needed("imagehash", "--near-images") if self._phash else None

    def measure(self, part: ImagePart) -> Picture:
        """Open and measure a picture.

        Raises:
            ImageError: It cannot be read: the fault of its document.
            DataError: A disk or network fails, or the scorer does.
        """
        data = part.read()
        try:
            image = upright_rgb(part.decode(data))
        except ImageError:
            raise
        except Exception as error:  # no range of values, or Pillow cannot decode the pixels
            raise ImageError(part.name, one_line(error), "Replace or remove it") from error
        pixels = digest_of_pixels(image) if self._pixels else b""
        phash = self._hash(image) if self._phash else None
        blocked = -1
        if self._blocklist.has_pictures:
            name = hashlib.sha256(data).hexdigest()
            blocked = self._blocklist.in_picture(name, pixels.hex(), phash)
        return Picture(
            image.width,
            image.height,
            int.from_bytes(pixels[:8], "little"),
            phash,
            math.nan if self._scorer is None else self._score(image, part.name),
            blocked,
        )

    def _hash(self, image: Image.Image) -> int | None:
        assert self._imagehash is not None
        small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=int)
        if np.ptp(small) <= _FLAT_LEVELS:
            return None
        bits = self._imagehash.phash(image, hash_size=HASH_SIDE).hash
        return int.from_bytes(np.packbits(bits).tobytes(), "big")

    def _score(self, image: Image.Image, name: str) -> float:
        assert self._scorer is not None
        try:
            return float(self._scorer(image))
        except Exception as error:  # of other people's code
            what = f"the scorer failed ({type(error).__name__}: {one_line(error)})"
            raise DataError(
                name, what, "Correct --scorer; NaN says that there is no score"
            ) from error
