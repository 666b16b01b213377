import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.photographs.codecs import best_within, jpeg, payload_bytes, scan_bytes, webp
from examples.photographs.pictures import write_crops


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((64, 64), Image.Resampling.BICUBIC)


def test_the_bytes_of_a_scan_are_those_between_the_tables_and_the_end(photo: Image.Image) -> None:
    data = jpeg(photo, 50)
    scan = data[-2 - scan_bytes(data) : -2]
    header = data[: -2 - len(scan)]
    assert header.rfind(b"\xff\xda") == len(header) - 14 and len(header) > 200  # SOS of 3 channels
    with Image.open(io.BytesIO(header + scan + data[-2:])) as image:
        image.load()


def test_the_best_that_fits_is_taken(photo: Image.Image) -> None:
    original = np.asarray(photo).astype(float)
    errors = []
    for budget in (60, 200, 10_000):
        found = best_within(photo, budget, webp, payload_bytes)
        assert found is not None and found.shape == (64, 64, 3)
        errors.append(np.square(found - original).mean())
    assert errors[0] > errors[1] > errors[2]
    assert best_within(photo, 100, jpeg, len) is None  # its tables alone are longer


def test_no_held_out_pixel_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The left three quarters of every picture are black, and the rest white."""
    image = Image.new("RGB", (400, 100))
    image.paste((255, 255, 255), (300, 0, 400, 100))
    names = ("astronaut.png", "coffee.png")
    monkeypatch.setattr(
        "examples.photographs.pictures.photographs", lambda: [(name, image) for name in names]
    )
    write_crops(tmp_path, crops=20, held_out=5)
    for part, color in (("train", 0), ("regions", 255)):
        paths = sorted((tmp_path / part).iterdir())
        assert len(paths) == (20 if part == "train" else 5)
        assert all((np.asarray(Image.open(path)) == color).all() for path in paths)
