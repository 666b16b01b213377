"""What the pixels of an image mean: RGB of 8 bits in the colours of sRGB, on white, upright.

The order is fixed: levels are brought to 8 bits, colours to sRGB, what is transparent is blended
with white, and the image is turned as its EXIF data say.
"""

import functools
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

RULES = 2
"""Changes whenever the same file becomes other pixels, so that image codes are not mixed."""
PIXELS_AT_ONCE = 1 << 20
"""Pixels that are computed on at once, so that an image needs little memory besides its own."""
LARGEST_PROFILE_BYTES = 4 << 20

_WHITE_IS_ZERO = 0
_BITS, _PHOTOMETRIC = 258, 262
_RANGES = ((340, 341), (280, 281))
"""TIFF's SMinSampleValue and SMaxSampleValue, then MinSampleValue and MaxSampleValue."""
_MODE_OF_SPACE = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}
"""The colour space in the header of a profile -> the mode that it describes."""


class PixelError(ValueError):
    """The image has no range of values, so that its pixels say nothing."""


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into what a person sees.

    Args:
        image: Any PIL image. If it was opened from a file, its metadata are used: the transparent
            level or colour, the colour profile, the orientation, and the range of the values.

    Returns:
        A new image in the mode RGB, or the same one if nothing has to be done.

    Raises:
        PixelError: All pixels have the same value, and no range is stated.
        Exception: Pillow cannot decode the pixels.

    Source: ``_whiten_transparency`` of ``image_tokenizer.py`` in the reference code, which blends
    in floating point and truncates. It ignores profiles, transparent colours and levels above 255.
    """
    image.load()  # raises if the image is broken
    turn = _orientation(image)
    rgb = _rgb_on_white(image)
    return rgb if turn is None else rgb.transpose(turn)


def digest_of_pixels(image: Image.Image) -> bytes:
    """The SHA-256 of what a person sees: equal for all files that hold the same picture losslessly.

    Args:
        image: As for ``upright_rgb``.

    Returns:
        32 bytes, of the width, the height and the rows of ``upright_rgb``.

    Raises:
        PixelError, Exception: As ``upright_rgb``.
    """
    rgb = upright_rgb(image)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    for box in _bands(rgb.size):
        digest.update(rgb.crop(box).tobytes())
    return digest.digest()


def _rgb_on_white(image: Image.Image) -> Image.Image:
    to_srgb = _to_srgb(image)
    if image.mode == "RGB" and "transparency" not in image.info and to_srgb is None:
        return image
    scale = _scale_of(image)
    rgb = Image.new("RGB", image.size)
    for box in _bands(image.size):
        levels, alpha = _split(image.crop(box), scale)
        band = levels.convert("RGB") if to_srgb is None else to_srgb.apply(levels)
        rgb.paste(band if alpha is None else _on_white(band, alpha), box)
    return rgb


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cut an image into bands of a million pixels."""
    width, height = size
    rows = max(1, PIXELS_AT_ONCE // max(width, 1))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _split(image: Image.Image, scale: "_Scale | None") -> tuple[Image.Image, Image.Image | None]:
    """Levels of 8 bits without transparency, and the alpha channel (L) if there is one."""
    key = image.info.get("transparency")
    if scale is not None:
        return scale.apply(np.asarray(image), key)
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "RGB"):
        return image, _alpha_of_key(image, key)
    if image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGB")
    return image, None


def _alpha_of_key(image: Image.Image, key: Any) -> Image.Image | None:
    """The alpha channel of an image in which one level or colour is transparent."""
    levels = [key] if isinstance(key, int) else key
    if not isinstance(levels, list | tuple) or len(levels) != len(image.getbands()):
        return None
    if max(levels) > 255:  # the key of a PNG with 16 bits, of which Pillow keeps the upper 8
        levels = [level >> 8 for level in levels]
    equal_HW = np.ones((image.height, image.width), dtype=bool)
    for band, level in zip(image.split(), levels, strict=True):
        equal_HW &= np.asarray(band) == level
    return _alpha(equal_HW)


def _alpha(clear_HW: np.ndarray) -> Image.Image | None:
    """The alpha channel in which these pixels are transparent; None if there are none."""
    if not clear_HW.any():
        return None
    return Image.fromarray(np.where(clear_HW, 0, 255).astype(np.uint8))


# Levels of more than 8 bits


@dataclass(frozen=True)
class _Scale:
    """How levels of 16 or 32 bits or of floating point become 8 bits."""

    low: float
    """The value that is black, or white if ``inverted``."""
    high: float
    inverted: bool

    def apply(self, values_HW: np.ndarray, key: Any) -> tuple[Image.Image, Image.Image | None]:
        """Scaled levels, and the alpha channel: values that are not numbers are transparent."""
        values_HW = values_HW.astype(np.float64)
        clear_HW = np.isnan(values_HW)
        if isinstance(key, int):
            clear_HW |= values_HW == key
        finite_HW = np.nan_to_num(values_HW, nan=self.low, posinf=self.high, neginf=self.low)
        share_HW = ((finite_HW - self.low) / (self.high - self.low)).clip(0, 1)
        levels_HW = np.rint(share_HW * 255).astype(np.uint8)
        return Image.fromarray(255 - levels_HW if self.inverted else levels_HW), _alpha(clear_HW)


def _scale_of(image: Image.Image) -> _Scale | None:
    """The scale of an image; None if its levels have 8 bits.

    16 bits have the range of their bits. 32 bits and floating point have the range that the file
    states, or else that of their own finite values.

    Raises:
        PixelError: There is no such range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    tags: Mapping[int, Any] = getattr(image, "tag_v2", None) or {}
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode.startswith("I;16"):
        bits = min(max(int(_number(tags.get(_BITS)) or 16), 1), 16)
        return _Scale(0, 2**bits - 1, inverted)
    if image.mode == "I" and getattr(image, "format", None) == "PPM":  # scaled by Pillow
        return _Scale(0, 65535, inverted)
    for low_tag, high_tag in _RANGES:
        low, high = _number(tags.get(low_tag, 0)), _number(tags.get(high_tag))
        if low is not None and high is not None and low < high:
            return _Scale(low, high, inverted)
    return _Scale(*_range_of_values(image), inverted)


def _range_of_values(image: Image.Image) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for box in _bands(image.size):
        values_HW = np.asarray(image.crop(box))
        finite_HW = np.isfinite(values_HW)
        if finite_HW.any():
            low = min(low, float(values_HW[finite_HW].min()))
            high = max(high, float(values_HW[finite_HW].max()))
    if low > high:
        raise PixelError("none of its values is a number")
    if low == high:
        raise PixelError(f"all its values are {low:g}, and it states no range")
    return low, high


def _number(value: Any) -> float | None:
    """The number of a TIFF tag, which may be in a tuple; None if it has none."""
    if isinstance(value, tuple) and value:
        value = value[0]
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if np.isfinite(number) else None


# Colours


def _to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What turns levels into the colours of sRGB; None if they have these colours."""
    mode = _mode_of_levels(image.mode)
    profiles: list[Any] = [_profile(image.info.get("icc_profile"), mode)]
    if mode == "LAB":  # which Pillow converts in no other way
        profiles.append(ImageCms.createProfile("LAB"))
    for profile in profiles:
        try:
            if profile is not None:
                srgb = ImageCms.createProfile("sRGB")
                # Optimized, gray levels are up to 10 levels off where the tone curve is steep.
                flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
                return ImageCms.buildTransform(profile, srgb, mode, "RGB", flags=flags)
        except ImageCms.PyCMSError:  # a profile that lacks its tables
            continue
    return None


def _mode_of_levels(mode: str) -> str:
    """The mode of what ``_split`` returns."""
    if mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16"):
        return "L"
    return mode if mode in ("CMYK", "LAB") else "RGB"


def _profile(data: Any, mode: str) -> ImageCms.ImageCmsProfile | None:
    """A colour profile, if it says anything that can be used.

    Browsers ignore a broken profile and one for another kind of image, and so do we.
    """
    if not isinstance(data, bytes) or not 128 <= len(data) <= LARGEST_PROFILE_BYTES:
        return None
    if _MODE_OF_SPACE.get(data[16:20]) != mode:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = ImageCms.getProfileDescription(profile)
    except Exception:  # whatever littleCMS and Pillow say of a broken profile
        return None
    return None if name.startswith("sRGB") else profile


# Transparency


def _on_white(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """Blend a band with white; what is transparent as a whole, mostly all of it, goes fast."""
    alpha_HW = np.asarray(alpha)
    blended_HW = (alpha_HW > 0) & (alpha_HW < 255)
    if blended_HW.any():
        values_HWC = np.array(rgb)
        alpha_N, values_NC = alpha_HW[blended_HW], values_HWC[blended_HW]
        values_HWC[blended_HW] = _blended()[alpha_N[:, None], values_NC]
        rgb = Image.fromarray(values_HWC)
    if alpha_HW.min(initial=255) == 0:
        clear_HW = np.where(alpha_HW, 0, 255).astype(np.uint8)
        rgb.paste((255, 255, 255), mask=Image.fromarray(clear_HW))
    return rgb


@functools.cache
def _blended() -> np.ndarray:
    """Level on white by alpha and level: uint8 [256, 256], in the reference code's arithmetic."""
    alpha = np.arange(256)[:, None] / 255.0
    levels: np.ndarray = (1 - alpha) * 255 + alpha * np.arange(256)[None, :]
    return levels.astype(np.uint8)


# Orientation

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # The pixels are fine, but some cameras and editors write EXIF blocks that Pillow's parser
        # cannot read. The orientation is then unknown.
        return None
