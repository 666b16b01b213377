"""Files that outsiders wrote to take time or memory: each is refused at once, or costs little."""

import io
import struct
import subprocess
import zlib
from typing import Any

import pytest
from PIL import Image

from megatron_chameleon.images.decoding import FORMATS, LONGEST_SIDE, MOST_SCANS, decode_image
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (2, 2)) -> bytes:
    """A red PNG with more chunks between header and pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 2) * 2))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def fault(data: bytes, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "x", ImageOptions(**options))
    assert "\n" not in str(caught.value)
    return caught.value


def icon(inner: bytes, kind: int = 1) -> bytes:
    """An icon or cursor of 16 x 16 pixels, as it says, with another image inside."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, kind, 1) + entry + inner


def dib(width: int, height: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, 0, 0, 0, 0, 0)


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int]) -> bytes:
    colours = struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + colours + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x02D\x01\0;"


def tiff(width: int, height: int, tile: int = 0) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 8 if tile else 1), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 200), (325, 50)] if tile else [(273, 200), (279, 50)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes(1000)


def jpeg_of_size(width: int, height: int) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


WEBP = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
BMP = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
BOMBS = {
    "png": png(size=(30000, 30000)),
    "png, just above our limit": png(size=(8193, 8192)),
    "gif screen": gif((65535, 65535), (0, 0, 1, 1)),
    "gif frame": gif((1, 1), (60000, 60000, 5000, 5000)),
    "tiff": tiff(1 << 31, 1 << 31),
    "jpeg": jpeg_of_size(65535, 65535),
    "webp": WEBP + b"\xfe\x3f\0" * 2,
    "bmp": BMP + dib(30000, 30000) + bytes(1000),
    "icon of png": icon(png(size=(12000, 12000))),
    "icon of bmp": icon(dib(12000, 24000)),
    "cursor": icon(dib(12000, 24000), kind=2),
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
    "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(10),
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(20),
    "xpm": b'/* XPM */\nstatic char *x[] = {\n"60000 60000 1 1",\n"a c #000000",\n"a"};',
    "a side": b"P5 1 2000000 255\n" + bytes(2_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_too_large(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = Image.core.new

    def small(mode: str, size: tuple[int, int]) -> object:
        assert size[0] * size[1] < 1 << 20, "memory for the pixels was asked for"
        return new(mode, size)

    monkeypatch.setattr(Image.core, "new", small)
    found = fault(BOMBS[name])
    assert found.reason == "too large image", found
    assert "the limit is" in found.what and any(letter.isdigit() for letter in found.what)


def test_the_limit_is_an_option() -> None:
    data = saved(Image.new("L", (30, 20)), "PNG")
    found = fault(data, max_pixels=599)
    assert found.what == "the image is too large (600 pixels, the limit is 599)"
    assert found.remedy == "Make it smaller, or raise --max-image-pixels"
    assert decode_image(data, "x", ImageOptions(max_pixels=600)).size == (30, 20)


def test_a_side_is_as_long_as_the_limit() -> None:
    data = f"P5 1 {LONGEST_SIDE} 255\n".encode() + bytes(LONGEST_SIDE)
    assert decode_image(data, "x", ImageOptions()).height == LONGEST_SIDE


@pytest.mark.parametrize("tile", [65536, 1 << 31])
def test_huge_tiles_are_corrupt_or_too_large(tile: int) -> None:
    assert fault(tiff(16, 16, tile)).reason in ("corrupt image", "too large image")


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_tags_that_overlap_are_not_copied() -> None:
    """5,000 EXIF tags of 1 MB each that all show the same bytes would take 5 GB."""
    tags = b"".join(struct.pack("<HHII", 1000 + n, 1, 1 << 20, 8) for n in range(5000))
    exif = b"II*\0" + struct.pack("<IH", 8, 5000) + tags + bytes(4) + bytes(1 << 20)
    image = decode_image(png(chunk(b"eXIf", exif)), "x", ImageOptions())
    held = sum(len(value) for value in image.getexif()._info._tagdata.values())  # type: ignore[union-attr]
    assert held < 3 * len(exif)


# PNG

TEXTS = {
    "compressed": chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2 << 20))),
    "international": chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    "many": chunk(b"tEXt", b"note\0" + b"x" * (1 << 20)) * 70,
    "exif": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2 << 20))),
    "not compressed": chunk(b"zTXt", b"note\0\0not zlib"),
    "profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2 << 20))),
    "broken profile": chunk(b"iCCP", b"name\0\0not zlib"),
    "empty": chunk(b"zTXt", b"") + chunk(b"tEXt", b"") + chunk(b"iTXt", b""),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_do_not_matter(name: str) -> None:
    """Pillow refuses an image whose texts are large."""
    image = decode_image(png(TEXTS[name]), "x", ImageOptions())
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_the_orientation_in_a_text_is_kept() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    image = decode_image(png(text), "x", ImageOptions())
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("length", [0, 1, 7, 8, 11, 20, 33, 40, 60])
def test_cut_files_are_corrupt(length: int) -> None:
    assert fault(png(TEXTS["compressed"])[:length]).reason == "corrupt image"


# JPEG


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = saved(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    found = fault(data[:-2] + last * MOST_SCANS + data[-2:])
    assert f"scans, more than {MOST_SCANS}" in found.what
    assert decode_image(data[:-2] + last * 20 + data[-2:], "x", ImageOptions()).size == (64, 64)


def test_marks_outside_the_image_are_no_scans() -> None:
    """A video or a gain map behind the image, a thumbnail and comments hold such bytes too."""
    data = saved(Image.new("RGB", (64, 64)), "JPEG", comment=b"\xff\xda" * 300, progressive=True)
    assert decode_image(data + b"\xff\xda\0\2" * 300, "x", ImageOptions()).size == (64, 64)


# Formats


EVERYDAY = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "ICO", "PPM", "JPEG2000")


@pytest.mark.parametrize("kind", EVERYDAY)
def test_everyday_formats_open(kind: str) -> None:
    assert decode_image(saved(Image.new("RGB", (16, 16)), kind), "x", ImageOptions()).width == 16


def test_no_other_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert fault(eps).what.endswith("cannot be decoded (unknown format)")
    assert not {"EPS", "WMF", "ICNS", "FITS", "HDF5", "GRIB", "BUFR", "MPEG"} & set(FORMATS)
