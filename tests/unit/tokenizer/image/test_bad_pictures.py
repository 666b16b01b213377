"""Pictures of every kind that people have: each is trained on, or dropped, counted and listed."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.cli.main import main

SMALL = ["--config", "digits", "model.resolution=8", "model.ch_mult=[1,1]"]
SMALL += ["model.codebook_size=16", "model.z_channels=8", "model.embed_dim=8"]
SMALL += ["training.batch_size=4", "training.steps=2", "training.measure_every_steps=0"]


def photo(size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def content(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_pictures(folder: Path) -> tuple[set[str], set[str]]:
    """Write them; returns the names of those that can be used, and of the others."""
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)
    frames = [photo(), photo((24, 16)).rotate(180)]
    png = content(photo(), "png")
    usable = {
        "cmyk.jpg": content(photo(mode="CMYK"), "jpeg"),
        "palette.png": content(photo(mode="P"), "png"),
        "grey-alpha.png": content(photo(mode="LA"), "png"),
        "bilevel.tif": content(photo(mode="1"), "tiff"),
        "16-bit.png": content(deep, "png"),
        "animated.gif": content(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "animated.webp": content(frames[0], "webp", save_all=True, append_images=frames[1:]),
        "one-pixel.png": content(photo((1, 1)), "png"),
        "thin.png": content(photo((2000, 1)), "png"),
        "jpeg-named.png": content(photo(), "jpeg"),
        "png-named.jpg": png,
    }
    bad = {
        "truncated.png": png[:-200],
        "truncated.jpg": content(photo((640, 480)), "jpeg")[:4000],
        "empty.png": b"",
        "text.jpg": b"<html>404 not found</html>",
        "huge.png": _png_of(png, 30_000),
        "huge.bmp": _bmp_header(30_000),
        "vector.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    }
    for name, data in {**usable, **bad}.items():
        (folder / name).write_bytes(data)
    return set(usable), set(bad)


def _png_of(png: bytes, side: int) -> bytes:
    """A PNG that says it has so many pixels along each side."""
    header = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def _bmp_header(side: int) -> bytes:
    header = bytearray(content(photo((1, 1)), "bmp"))
    header[18:22] = header[22:26] = side.to_bytes(4, "little")
    return bytes(header)


@pytest.mark.parametrize("cache", ["1", "0"])
def test_each_picture_is_trained_on_or_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    usable, bad = write_pictures(photos)
    words = [photos, "--output", tmp_path / "out", *SMALL, f"training.cache_gib={cache}"]
    words += ["training.steps=40"] if cache == "0" else []  # until each has been drawn
    main(["tokenizer", "image", *map(str, words)])
    said = capsys.readouterr()
    lines = (tmp_path / "out" / "image.dropped.jsonl").read_text().splitlines()
    dropped = {Path(line["image"]).name: line["reason"] for line in map(json.loads, lines)}
    assert set(dropped) == bad
    assert all(reason and "\n" not in reason for reason in dropped.values())
    for name in ("huge.png", "huge.bmp"):
        assert "900000000 pixels, the limit is 67108864" in dropped[name]
    assert f"image tokenizer from {len(usable)} images ({len(bad)} dropped)" in said.out
    assert said.err.count("Traceback") == 0
    page = (tmp_path / "out" / "image.run" / "report.html").read_text()
    assert all(name in page for name in bad)
