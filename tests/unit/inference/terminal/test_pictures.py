"""What is printed for an image, read back by hand from the terminals' protocols."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.inference.terminal.pictures import (
    LARGEST_EDGE,
    Pictures,
    half_blocks,
    kitty,
    picture,
    sixel,
)


def noise(width: int, height: int, colours: int, seed: int = 1) -> Image.Image:
    """Squares of few colours, whose values are whole hundredths, as sixel states them."""
    rng = np.random.default_rng(seed)
    palette = np.round(rng.integers(0, 101, (colours, 3)) * 2.55).astype(np.uint8)
    return Image.fromarray(palette[rng.integers(0, colours, (height, width))])


def read_sixel(text: str) -> np.ndarray:
    """The pixels: [height, width, 3] in hundredths; each must be set exactly once."""
    body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.S)
    assert body
    width, height = int(body[1]), int(body[2])
    pixels = np.full((-(-height // 6) * 6, width, 3), -1)
    palette: dict[int, tuple[int, ...]] = {}
    x = y = colour = 0
    for token in re.finditer(
        r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|([$-])", body[3]
    ):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                palette[colour] = tuple(int(token[i]) for i in (2, 3, 4))
        elif token[8]:
            x, y = 0, y + 6 * (token[8] == "-")
        else:
            count, bits = int(token[5] or 1), ord(token[6] or token[7]) - 63
            for bit in range(6):
                if bits >> bit & 1:
                    assert (pixels[y + bit, x : x + count] == -1).all()
                    pixels[y + bit, x : x + count] = palette[colour]
            x += count
            assert x <= width
    assert (pixels[height:] == -1).all() and (pixels[:height] >= 0).all()
    return pixels[:height]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 6), (5, 13), (300, 2), (64, 64)])
def test_a_sixel_image_has_every_pixel(width: int, height: int) -> None:
    image = noise(width, height, 40)
    shown = np.round(np.asarray(image) / 2.55)
    assert np.abs(read_sixel(sixel(image)) - shown).max() <= 1, "to the rounding of hundredths"


def test_runs_of_a_colour_are_counted() -> None:
    assert len(sixel(Image.new("RGB", (640, 640), "red"))) < 1500


def test_photographs_take_the_nearest_of_256_colours() -> None:
    red, green = np.meshgrid(np.arange(128), np.arange(128))
    gradient = Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))
    shown = read_sixel(sixel(gradient)) * 2.55
    assert np.abs(shown - np.asarray(gradient)).mean() < 4


def test_kitty_gets_a_png_in_chunks() -> None:
    image = noise(90, 70, 200)
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(image))
    assert len(chunks) > 2 and all(len(data) <= 4096 for _, data in chunks)
    assert [control for control, _ in chunks] == (
        ["a=T,f=100,q=2,m=1", *["m=1"] * (len(chunks) - 2), "m=0"]
    )
    data = base64.b64decode("".join(data for _, data in chunks))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_half_blocks_have_two_pixels_each() -> None:
    image = noise(5, 3, 4)
    pixels = np.asarray(image)
    lines = half_blocks(image, truecolour=True).split("\n")
    assert len(lines) == 3 and all(line.endswith("\x1b[0m") for line in lines[:-1])
    for row, line in enumerate(lines[:-1]):
        upper = lower = None
        column = 0
        for colour in re.finditer(r"\x1b\[([34])8;2;(\d+);(\d+);(\d+)m|(\u2580)", line):
            rgb = tuple(int(part) for part in colour.groups()[1:4] if part)
            if colour[1] == "3":
                upper = rgb
            elif colour[1]:
                lower = rgb
            else:
                assert upper == tuple(pixels[2 * row, column])
                assert row or lower == tuple(pixels[1, column])
                column += 1
        assert column == 5


def test_256_colours_are_the_nearest_of_the_cube() -> None:
    image = Image.fromarray(np.array([[[0, 100, 255]]], dtype=np.uint8))
    assert half_blocks(image, truecolour=False) == "\x1b[38;5;27m\u2580\x1b[0m\n"


def test_images_fit_the_terminal() -> None:
    big = Image.new("L", (2000, 1000))
    lines = picture(big, Pictures.BLOCKS, 60, 24).splitlines()
    assert len(lines) == 15 and lines[0].count("\u2580") == 60
    tall = picture(big.rotate(90, expand=True), Pictures.BLOCKS_256, 200, 24).splitlines()
    assert len(tall) == 21, "with room for the prompt"
    assert f'"1;1;{LARGEST_EDGE};320' in picture(big, Pictures.SIXEL, 60, 24)
    assert '"1;1;192;96' in picture(Image.new("RGB", (16, 8)), Pictures.SIXEL, 60, 24)
    assert picture(big, Pictures.NONE, 60, 24) == ""
    assert picture(Image.new("RGB", (900, 1)), Pictures.BLOCKS, 10, 1).count("\u2580") == 10
