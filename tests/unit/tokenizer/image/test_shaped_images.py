"""Images that keep their shape: their grid, their pixels, their codes and back."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.grids import Grid, Shapes
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer, prepare_image

Noise = Callable[..., Image.Image]
SHAPES = Shapes(16)


@pytest.fixture(scope="module")
def shaped(tokenizer_folder: Path) -> ImageTokenizer:
    return ImageTokenizer.load(tokenizer_folder, shapes=SHAPES)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (4, 4)),
        ((1, 1), (4, 4)),
        ((400, 100), (2, 8)),
        ((50, 31), (3, 5)),
        ((31, 50), (5, 3)),
        ((9, 5000), (8, 2)),
    ],
)
def test_an_image_has_the_size_of_the_nearest_grid(
    shaped: ImageTokenizer, noise: Noise, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    found, pixels = shaped.prepare(noise(size=size))
    assert found == grid
    assert pixels.shape == (4 * grid[0], 4 * grid[1], 3)
    assert shaped.size_of(found) == pixels.shape[1::-1]


def test_only_what_does_not_fit_the_grid_is_cropped(shaped: ImageTokenizer) -> None:
    """36 x 20 pixels cover 5 x 3 codes (20 x 12 pixels) as 21.6 x 12, whose ends are cropped."""
    image = Image.new("RGB", (36, 20), "lime")
    image.paste("red", (0, 0, 1, 20))
    image.paste("blue", (35, 0, 36, 20))
    grid, pixels = shaped.prepare(image)
    assert grid == (3, 5)
    assert (pixels[:, 3:-3] == [0, 255, 0]).all(), "the ends of 1 pixel are nearly gone"
    _, whole = shaped.prepare(image, pad=True)
    assert whole[6, 0, 0] > 100 and whole[6, -1, 2] > 100
    assert (whole[-1] == 255).all(), "a border below it"


@pytest.mark.parametrize("size", [(1000, 100), (100, 1000), (30_000, 1), (1, 30_000)])
def test_an_image_beyond_the_largest_ratio_is_not_cropped(
    shaped: ImageTokenizer, size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "black")
    image.paste("red", (0, 0, max(1, size[0] // 8), max(1, size[1] // 8)))
    grid, pixels = shaped.prepare(image)
    assert grid.elongation == 4
    pixels = pixels if size[0] > size[1] else pixels.transpose(1, 0, 2)
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all(), "a white border"
    content = pixels[(pixels != 255).any(axis=2).any(axis=1)]
    assert content[0, 0, 0] > content[0, 0, 1] and content[0, -1].max() < 80, "both of its ends"


def test_an_image_a_little_beyond_it_is_cropped(shaped: ImageTokenizer) -> None:
    grid, pixels = shaped.prepare(Image.new("RGB", (430, 100)))
    assert grid == (2, 8) and not pixels.any()


def test_the_orientation_of_a_camera_counts(shaped: ImageTokenizer) -> None:
    image = Image.new("RGB", (80, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.info["exif"] = exif.tobytes()
    assert shaped.prepare(image)[0] == (8, 2)


def test_squares_are_what_they_were(shaped: ImageTokenizer, noise: Noise) -> None:
    for seed, size in enumerate([(16, 16), (40, 40), (7, 7)]):
        image = noise(seed, size)
        np.testing.assert_array_equal(shaped.prepare(image)[1], prepare_image(image, 16))
        np.testing.assert_array_equal(prepare_image(image, (16, 16)), prepare_image(image, 16))


def test_without_shapes_every_image_is_the_square(tokenizer_folder: Path, noise: Noise) -> None:
    plain = ImageTokenizer.load(tokenizer_folder)
    assert plain.grids == ((4, 4),) and plain.largest_codes == plain.codes_per_image == 16
    images = [noise(seed, size) for seed, size in enumerate([(16, 16), (80, 20), (3, 9)])]
    found = plain.encode_shaped(images)
    assert [grid for grid, _ in found] == [(4, 4)] * 3
    np.testing.assert_array_equal(np.stack([codes for _, codes in found]), plain.encode(images))


def test_codes_do_not_depend_on_the_images_beside_them(
    shaped: ImageTokenizer, noise: Noise
) -> None:
    """Of 19 images in four shapes, more than a pass of some and less of others."""
    sizes = [(16, 16), (80, 20), (20, 80), (50, 30)]
    images = [noise(seed, sizes[seed % 4 if seed < 12 else 0]) for seed in range(19)]
    together = shaped.encode_shaped(images)
    for image, (grid, codes) in zip(images, together, strict=True):
        (alone,) = shaped.encode_shaped([image])
        assert alone[0] == grid and codes.shape == (grid.codes,)
        np.testing.assert_array_equal(alone[1], codes)
    assert len({codes.tobytes() for _, codes in together}) > 15


def test_images_come_back_in_their_size_and_order(shaped: ImageTokenizer, noise: Noise) -> None:
    sizes = [(16, 16), (80, 20), (20, 80), (16, 16), (50, 30)]
    pictures = shaped.encode_shaped([noise(seed, size) for seed, size in enumerate(sizes)])
    images = shaped.decode_shaped(pictures)
    assert [image.size for image in images] == [(16, 16), (32, 8), (8, 32), (16, 16), (20, 12)]
    for picture, image in zip(pictures, images, strict=True):
        (alone,) = shaped.decode_shaped([picture])
        close = np.abs(np.asarray(alone, int) - np.asarray(image, int)).max()
        assert close <= 1  # the batch may change the last bit before rounding


@pytest.mark.parametrize(
    ("grid", "codes", "message"),
    [
        ((4, 4), np.zeros(15, int), "image 0 has the grid 4 x 4 and codes of shape (15,)"),
        ((1, 9), np.zeros(9, int), "the tokenizer has 9 grids, from 8 x 2 to 2 x 8"),
        ((4, 4), np.full(16, 32), "values from 32 to 32 are outside [0, 32)"),
    ],
)
def test_codes_that_are_no_image_are_refused(
    shaped: ImageTokenizer, grid: tuple[int, int], codes: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        shaped.decode_shaped([(Grid(*grid), codes)])


def test_a_network_of_one_square_and_a_vocabulary_with_grids_are_refused(
    shaped: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shaped.model, "fixed_grid", True)
    with pytest.raises(DataError, match="takes only squares of 4 x 4 codes, and its vocabulary"):
        ImageTokenizer(shaped.model, shapes=SHAPES)
