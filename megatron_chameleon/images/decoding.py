"""Decodes image files of outsiders, within limits of time and memory.

Only formats that hold pixels are decoded. Pillow would start Ghostscript for EPS, and formats such
as ICNS are folders of other files.
"""

import io
import re
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError

from megatron_chameleon.errors import one_line
from megatron_chameleon.images.image_error import ImageError, too_large
from megatron_chameleon.images.options import IGNORE, ImageOptions
from megatron_chameleon.images.untrusted_bytes import (
    gray_bits_of_png,
    scans_of_jpeg,
    size_in_icon,
    without_large_chunks,
)

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM"),
    *("ICO", "CUR", "TGA", "PCX", "SGI", "QOI", "DDS", "PSD", "SUN", "XBM", "XPM", "MSP"),
)
"""What Pillow may decode, by its names. An MPO is a JPEG with more images behind it."""
MOST_SCANS = 100
"""Of a progressive JPEG. Encoders write about ten; each one is a pass over all pixels."""
LONGEST_SIDE = 1 << 20
"""Pixels; Pillow needs memory for each row besides that of its pixels."""

# Pillow keeps pixels in blocks of 16 MiB. Once one of them has been freed, malloc takes the next
# from its heap and does not give them back: one process held 290 MiB of finished pictures. Blocks
# above 32 MiB are always mapped and unmapped. A small picture still takes only what it needs.
Image.core.set_block_size(40 << 20)


def decode_image(
    data: bytes,
    name: str,
    options: ImageOptions,
    before_pixels: Callable[[Image.Image], None] = lambda _: None,
) -> Image.Image:
    """Decode the first frame or page of an image file.

    Args:
        data: The bytes of the file.
        name: What errors call it.
        options: The limit of pixels, and whether a colour profile is kept.
        before_pixels: Called when the mode and size are known and no pixel is decoded.

    Returns:
        The image, with its pixels in memory. ``images/pixels.py`` says what they mean.

    Raises:
        ImageError: It is too large, corrupt, or of a format that is not decoded.
    """
    try:
        if (scans := scans_of_jpeg(data)) > MOST_SCANS:
            what = f"the JPEG has {scans} scans, more than {MOST_SCANS}"
            raise ImageError(name, what, "Write the image again")
        _check_size(size_in_icon(data), name, options)
        image = Image.open(io.BytesIO(without_large_chunks(data)), formats=_formats())
        _check_size(image.size, name, options)
        before_pixels(image)
        image.load()
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions
        if isinstance(error, Image.DecompressionBombError):
            sizes = re.findall(r"\d+", str(error))  # Pillow's own limit, above which no option goes
            what = f"{sizes[0] if sizes else 'more'} pixels, the limit is {options.max_pixels}"
            raise too_large(name, what, "Make it smaller or remove it") from error
        # Pillow's own message for this one holds an address, different in each run
        unknown = isinstance(error, UnidentifiedImageError)
        cause = "unknown format" if unknown else one_line(error)
        what = f"the image of {len(data)} bytes cannot be decoded ({cause})"
        raise ImageError(name, what, "Replace or remove it") from error
    _explain(image, data)
    if options.profiles == IGNORE:
        image.info.pop("icc_profile", None)
    return image


def _check_size(size: tuple[int, int], name: str, options: ImageOptions) -> None:
    pixels = size[0] * size[1]
    if pixels > options.max_pixels:
        what = f"{pixels} pixels, the limit is {options.max_pixels}"
        raise too_large(name, what, "Make it smaller, or raise --max-image-pixels")
    if max(size) > LONGEST_SIDE:
        what = f"a side of {max(size)} pixels, the limit is {LONGEST_SIDE}"
        raise too_large(name, what, "Cut it into several images")


def _formats() -> list[str]:
    """Those of the formats that this installation of Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _explain(image: Image.Image, data: bytes) -> None:
    """Pillow scales gray levels of 2 and 4 bits to 8, but not the level that is transparent."""
    key, bits = image.info.get("transparency"), gray_bits_of_png(data)
    if image.mode == "L" and isinstance(key, int) and bits in (2, 4):
        image.info["transparency"] = key % (1 << bits) * (255 // ((1 << bits) - 1))
