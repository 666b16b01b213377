"""Show images in a terminal: sixel, kitty's protocol, or half blocks of coloured characters.

Sources: DEC STD 070 and vt340 manuals (sixel), kitty's "Terminal graphics protocol".
"""

import base64
from enum import StrEnum

import numpy as np
from PIL import Image

from megatron_chameleon.images.png import png_bytes

SMALLEST_EDGE = 192
"""Pixels; smaller images are enlarged by a whole factor."""
LARGEST_EDGE = 640
CHUNK_CHARACTERS = 4096
"""Of kitty's protocol."""
MOST_COLOURS = 256
_LEVELS = (0, 95, 135, 175, 215, 255)
"""Of the colour cube of 256-colour terminals, whose first colour is number 16."""


class Pictures(StrEnum):
    """How a terminal shows images."""

    SIXEL = "sixel"
    KITTY = "kitty"
    BLOCKS = "blocks"
    """Two pixels above one another in each character, in 24-bit colour."""
    BLOCKS_256 = "blocks256"
    """The same in 256 colours."""
    NONE = "none"


def picture(image: Image.Image, how: Pictures, columns: int, lines: int) -> str:
    """What to print for an image, with its own line breaks; empty for ``NONE``.

    Args:
        image: The image.
        how: What the terminal understands.
        columns: Width of the terminal in characters.
        lines: Its height.
    """
    rgb = image.convert("RGB")
    if how is Pictures.SIXEL:
        return f"{sixel(_enlarged(rgb))}\n"
    if how is Pictures.KITTY:
        return f"{kitty(_enlarged(rgb))}\n"
    if how is Pictures.NONE:
        return ""
    scale = min(columns / rgb.width, 2 * max(1, lines - 3) / rgb.height, 1.0)
    size = max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))
    small = rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)
    return half_blocks(small, truecolour=how is Pictures.BLOCKS)


def _enlarged(rgb: Image.Image) -> Image.Image:
    """A small image with larger square pixels, a large one made smaller."""
    edge = max(rgb.size)
    if edge > LARGEST_EDGE:
        small = rgb.copy()
        small.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
        return small
    factor = -(-SMALLEST_EDGE // edge)
    size = (rgb.width * factor, rgb.height * factor)
    return rgb.resize(size, Image.Resampling.NEAREST)


def sixel(rgb: Image.Image) -> str:
    """An image in DEC's sixel format: bands of six rows, one line for each colour of a band."""
    paletted = rgb.quantize(MOST_COLOURS)
    pixels_HW = np.asarray(paletted)
    palette = np.asarray(paletted.getpalette(), dtype=np.float64).reshape(-1, 3) * 100 / 255
    used = np.unique(pixels_HW)
    out = [f'\x1bP0;1q"1;1;{rgb.width};{rgb.height}']
    for colour in used:
        red, green, blue = (round(float(part)) for part in palette[colour])
        out.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, rgb.height, 6):
        band = pixels_HW[top : top + 6]
        weights = (1 << np.arange(len(band)))[:, None]
        parts = []
        for colour in np.unique(band):
            bits = ((band == colour) * weights).sum(axis=0)
            parts.append(f"#{colour}{_run_lengths(bits)}")
        out.append("$".join(parts) + "-")
    return "".join(out) + "\x1b\\"


def _run_lengths(bits: np.ndarray) -> str:
    borders = np.flatnonzero(np.diff(bits)) + 1
    starts = [0, *borders.tolist()]
    out = []
    for start, end in zip(starts, [*starts[1:], len(bits)], strict=True):
        character, count = chr(63 + int(bits[start])), end - start
        out.append(f"!{count}{character}" if count > 3 else character * count)
    return "".join(out)


def kitty(rgb: Image.Image) -> str:
    """An image in kitty's graphics protocol: a PNG in base64, in chunks; no reply is asked for."""
    text = base64.b64encode(png_bytes(rgb)).decode()
    chunks = [text[i : i + CHUNK_CHARACTERS] for i in range(0, len(text), CHUNK_CHARACTERS)]
    out = []
    for number, chunk in enumerate(chunks):
        first = "a=T,f=100,q=2," if number == 0 else ""
        out.append(f"\x1b_G{first}m={int(number + 1 < len(chunks))};{chunk}\x1b\\")
    return "".join(out)


def half_blocks(rgb: Image.Image, *, truecolour: bool) -> str:
    """Lines of upper half blocks, whose text colour is the upper pixel and background the lower.

    Args:
        rgb: At most as wide as the terminal.
        truecolour: Whether the terminal has 24-bit colours; otherwise it has 256.
    """
    pixels_HW3 = np.asarray(rgb)
    lines = []
    for top in range(0, rgb.height, 2):
        line, before = [], ""
        for x in range(rgb.width):
            colours = _colour(38, pixels_HW3[top, x], truecolour)
            if top + 1 < rgb.height:
                colours += _colour(48, pixels_HW3[top + 1, x], truecolour)
            line.append(("" if colours == before else colours) + "\u2580")
            before = colours
        lines.append("".join(line) + "\x1b[0m\n")
    return "".join(lines)


def _colour(layer: int, rgb: np.ndarray, truecolour: bool) -> str:
    red, green, blue = (int(part) for part in rgb)
    if truecolour:
        return f"\x1b[{layer};2;{red};{green};{blue}m"
    cube = [min(range(6), key=lambda n: abs(_LEVELS[n] - part)) for part in (red, green, blue)]
    return f"\x1b[{layer};5;{16 + 36 * cube[0] + 6 * cube[1] + cube[2]}m"
