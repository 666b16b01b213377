"""Crops of the photographs that come with scikit-image, scikit-learn and matplotlib.

Nothing is downloaded. Two whole photographs are held out, and of each other one the right quarter:
no pixel of a held-out crop is in a crop to train on.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
SOURCES = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/retina.jpg",
        "data/brick.png",
        "data/camera.png",
        "data/grass.png",
        "data/gravel.png",
        "data/moon.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
HELD_OUT = ("coffee.png", "flower.jpg")
HELD_OUT_SHARE = 0.25


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Name and pixels of each photograph."""
    for package, names in SOURCES.items():
        for name in names:
            with (files(package) / name).open("rb") as file, Image.open(file) as image:
                yield Path(name).name, image.convert("RGB")


def write_crops(folder: Path, crops: int, held_out: int, seed: int = 1) -> None:
    """Write FOLDER/train, FOLDER/regions and FOLDER/photographs, each of PNGs of 64 x 64 pixels.

    Args:
        folder: Where.
        crops: Number of crops to train on; as many of each photograph, some mirrored.
        held_out: Number of crops in each of the two other folders.
        seed: Of the places and sizes of the crops.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Image.Image]] = {"train": [], "regions": [], "photographs": []}
    for name, image in photographs():
        if name in HELD_OUT:
            parts["photographs"].append(image)
            continue
        edge = round(image.width * (1 - HELD_OUT_SHARE))
        parts["train"].append(image.crop((0, 0, edge, image.height)))
        parts["regions"].append(image.crop((edge, 0, image.width, image.height)))
    for part, images in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for index in range(crops if part == "train" else held_out):
            crop = _crop(images[index % len(images)], rng)
            if part == "train" and rng.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crop.save(folder / part / f"{index:05d}.png")


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of 64 pixels up to the whole height or width, made 64 pixels wide."""
    largest = min(min(image.size), 4 * SIDE)
    side = int(np.exp(rng.uniform(np.log(SIDE), np.log(max(largest, SIDE + 1)))))
    left, top = (int(rng.integers(0, size - side + 1)) for size in image.size)
    return image.crop((left, top, left + side, top + side)).resize(
        (SIDE, SIDE), Image.Resampling.LANCZOS
    )
