"""What the pixels of an image mean: RGB of 8 bits in the colours of sRGB, on white, upright.

The order is fixed: levels are brought to 8 bits, colours to sRGB, what is transparent is blended
with white, and the image is turned as its EXIF data say.
"""

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from megatron_chameleon.errors import one_line

RULES = 2
"""Changes whenever the same file becomes other pixels, so that image codes are not mixed."""
ROWS_AT_ONCE_PIXELS = 1 << 20
"""Pixels that are computed on at once, so that an image needs little memory besides its own."""
LARGEST_PROFILE_BYTES = 4 << 20

_WHITE_IS_ZERO = 0
_BITS, _PHOTOMETRIC = 258, 262
_RANGES = ((340, 341), (280, 281))
"""TIFF's SMinSampleValue and SMaxSampleValue, then MinSampleValue and MaxSampleValue."""
_SPACES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",), "Lab ": ("LAB",)}
"""The colour space of a profile -> the modes that it can describe."""


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


def _rgb_on_white(image: Image.Image) -> Image.Image:
    profile: Any = _profile(image)
    if image.mode == "RGB" and "transparency" not in image.info and profile is None:
        return image
    levels, alpha = _split(image)
    if levels.mode == "LAB":
        profile = profile or ImageCms.createProfile("LAB")
    rgb = _to_srgb(levels, profile) if profile is not None else levels.convert("RGB")
    return rgb if alpha is None else _on_white(rgb, alpha)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Levels of 8 bits without transparency, and the alpha channel (L) if there is one."""
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bits(image, key)
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
    equal = np.ones((image.height, image.width), dtype=bool)
    for band, level in zip(image.split(), levels, strict=True):
        equal &= np.asarray(band) == level
    return Image.fromarray(np.where(equal, 0, 255).astype(np.uint8)) if equal.any() else None


def _to_8_bits(image: Image.Image, key: Any) -> tuple[Image.Image, Image.Image | None]:
    """Gray levels of 16 or 32 bits or floating point, scaled to 0 to 255.

    16 bits have the range of their bits; the others have the range that the file states, or else
    that of their own finite values. Values that are not numbers are transparent.
    """
    values_HW = np.asarray(image)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", None) or {}
    low, high = _range(image, values_HW, tags)
    levels_HW = np.empty(values_HW.shape, dtype=np.uint8)
    clear_HW = np.zeros(values_HW.shape, dtype=bool)
    for rows in _bands(image.size):
        values = values_HW[rows].astype(np.float64)
        clear_HW[rows] = np.isnan(values)
        if isinstance(key, int):
            clear_HW[rows] |= values == key
        scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low)
        levels_HW[rows] = np.rint(scaled.clip(0, 1) * 255)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels_HW = 255 - levels_HW
    alpha = None
    if clear_HW.any():
        alpha = Image.fromarray(np.where(clear_HW, 0, 255).astype(np.uint8))
    return Image.fromarray(levels_HW), alpha


def _range(
    image: Image.Image, values_HW: np.ndarray, tags: Mapping[int, Any]
) -> tuple[float, float]:
    """The values that are black and white."""
    if image.mode.startswith("I;16"):
        bits = _number(tags.get(_BITS), 16)
        return 0, 2 ** min(max(int(bits), 1), 16) - 1
    if getattr(image, "format", None) == "PPM":  # Pillow scales integers to 16 bits
        return 0, 1 if image.mode == "F" else 65535
    for low_tag, high_tag in _RANGES:
        low, high = _number(tags.get(low_tag), 0), _number(tags.get(high_tag), 0)
        if low < high:
            return low, high
    finite_HW = np.isfinite(values_HW)
    if not finite_HW.any():
        raise PixelError("none of its values is a number")
    first: Any = values_HW[np.unravel_index(finite_HW.argmax(), finite_HW.shape)]
    low = float(values_HW.min(initial=first, where=finite_HW))
    high = float(values_HW.max(initial=first, where=finite_HW))
    if low == high:
        what = f"all its values are {low:g}, and it states no range"
        raise PixelError(what)
    return low, high


def _number(value: Any, default: float) -> float:
    """The number of a TIFF tag, which may be in a tuple; the default if it has none."""
    if isinstance(value, tuple) and value:
        value = value[0]
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return default
    return number if np.isfinite(number) else default


# Colours


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile, if it says anything that can be used.

    Browsers ignore a broken profile and one for another kind of image, and so do we.
    """
    data = image.info.get("icc_profile")
    if not isinstance(data, bytes) or not 128 <= len(data) <= LARGEST_PROFILE_BYTES:
        return None
    space = data[16:20].decode("latin-1")
    modes = _SPACES.get(space, ())
    mode = {"P": "RGB", "PA": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "1": "L"}.get(
        image.mode, image.mode
    )
    if mode in ("I", "F", "La") or mode.startswith("I;16"):
        mode = "L"
    if mode not in modes:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = ImageCms.getProfileDescription(profile)
    except Exception:  # whatever littleCMS and Pillow say of a broken profile
        return None
    return None if name.startswith("sRGB") else profile


def _to_srgb(levels: Image.Image, profile: Any) -> Image.Image:
    if levels.mode not in ("L", "CMYK", "LAB"):
        levels = levels.convert("RGB")
    srgb = ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(levels, profile, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:  # a profile that promises more than it holds
        if levels.mode == "LAB":
            raise PixelError(f"its colours cannot be converted ({one_line(error)})") from error
        converted = None
    return levels.convert("RGB") if converted is None else converted


# Transparency


def _on_white(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    values_HWC, alpha_HW = np.asarray(rgb), np.asarray(alpha)
    if alpha_HW.min(initial=255) == 255:
        return rgb
    table = _blended()
    blended_HWC = np.empty_like(values_HWC)
    for rows in _bands(rgb.size):
        blended_HWC[rows] = table[alpha_HW[rows][:, :, None], values_HWC[rows]]
    return Image.fromarray(blended_HWC)


@functools.cache
def _blended() -> np.ndarray:
    """Level on white by alpha and level: uint8 [256, 256], in the reference code's arithmetic."""
    alpha = np.arange(256)[:, None] / 255.0
    levels: np.ndarray = (1 - alpha) * 255 + alpha * np.arange(256)[None, :]
    return levels.astype(np.uint8)


def _bands(size: tuple[int, int]) -> list[slice]:
    """Rows of an image, a million pixels at a time."""
    width, height = size
    rows = max(1, ROWS_AT_ONCE_PIXELS // max(width, 1))
    return [slice(top, top + rows) for top in range(0, height, rows)]


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
