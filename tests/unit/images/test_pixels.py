"""Pixels of every mode: the reference code's blending, scaled levels, profiles, orientation."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from megatron_chameleon.images import pixels
from megatron_chameleon.images.decoding import decode_image
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import PixelError, upright_rgb

RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)
WHITE = [255, 255, 255]


def rgb_of(image: Image.Image) -> np.ndarray:
    result = upright_rgb(image)
    assert result.mode == "RGB"
    return np.asarray(result)


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image as a user of its file gets it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode_image(buffer.getvalue(), "x", ImageOptions())


def reference(image: Image.Image) -> np.ndarray:
    """The released code's rule, from its description: float64, on white, truncated."""
    if image.mode == "RGB":
        return np.asarray(image)
    rgba = np.array(image.convert("RGBA"))
    if not (rgba[:, :, 3] < 255).any():
        return np.asarray(image.convert("RGB"))
    alpha = (rgba[:, :, 3] / 255.0)[:, :, np.newaxis]
    return ((1 - alpha) * 255 + alpha * rgba[:, :, :3]).astype("uint8")


def all_pairs() -> Image.Image:
    """RGBA with every level at every alpha, and other levels in the other bands."""
    alpha, level = np.mgrid[:256, :256]
    bands = [level, level[:, ::-1], (level * 7 + alpha) % 256, alpha]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


def palette(transparency: int | bytes | None) -> Image.Image:
    image = all_pairs().convert("RGB").quantize(64)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES = {
    "RGBA": all_pairs(),
    "LA": Image.merge("LA", all_pairs().split()[2:]),
    "PA": palette(None).convert("PA"),
    "P": palette(None),
    "P with one": palette(3),
    "P with alphas": palette(bytes(range(0, 128, 2))),
    "RGBa": all_pairs().convert("RGBa"),
    "RGB": all_pairs().convert("RGB"),
    "RGBX": all_pairs().convert("RGB").convert("RGBX"),
    "L": all_pairs().getchannel(2),
    "1": all_pairs().convert("1"),
    "CMYK": all_pairs().convert("CMYK"),
    "YCbCr": all_pairs().convert("RGB").convert("YCbCr"),
    "HSV": all_pairs().convert("RGB").convert("HSV"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at_once", [1 << 20, 1000])
def test_transparency_is_blended_as_in_the_reference_code(
    mode: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "PIXELS_AT_ONCE", at_once)  # more bands than one, and one
    image = MODES[mode]
    np.testing.assert_array_equal(rgb_of(image), reference(image))


def test_blending_truncates() -> None:
    image = Image.new("RGBA", (1, 1), (255, 7, 10, 100))
    assert rgb_of(image).tolist() == [[[255, 157, 158]]]  # 255, 157.7 and 158.9


# One level or colour is transparent


def png(depth: int, colour: int, row: bytes, key: bytes) -> Image.Image:
    """A PNG file of one row, two pixels wide, with a transparent level or colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row))]
    data = b"".join(chunk(kind, content) for kind, content in [*parts, (b"IEND", b"")])
    return decode_image(b"\x89PNG\r\n\x1a\n" + data, "x", ImageOptions())


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "second"),
    [
        (1, 0, b"\x40", b"\0\0", 255),
        (2, 0, b"\x60", b"\0\1", 170),
        (4, 0, b"\x5a", b"\0\5", 170),
        (8, 0, b"\x07\x08", b"\0\7", 8),
        (16, 0, b"\1\2\1\3", b"\1\2", 1),
        (8, 2, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3", [1, 2, 4]),
        (16, 2, b"\1\2\3\4\5\6\1\2\3\4\6\6", b"\1\2\3\4\5\6", [1, 3, 6]),
    ],
)
def test_a_transparent_key_is_white(
    depth: int, colour: int, row: bytes, key: bytes, second: Any
) -> None:
    first_pixel, second_pixel = rgb_of(png(depth, colour, row, key))[0].tolist()
    assert first_pixel == WHITE
    assert second_pixel == (second if isinstance(second, list) else [second] * 3)


def test_a_key_that_is_nowhere_changes_nothing() -> None:
    image = Image.fromarray(RAMP.astype(np.uint8) // 2)
    np.testing.assert_array_equal(rgb_of(saved(image, "PNG", transparency=200)), rgb_of(image))


@pytest.mark.parametrize("key", [b"", b"\0", (1, 2), "x", (1, 2, 3, 4), None])
def test_a_key_of_the_wrong_kind_is_ignored(key: object) -> None:
    image = Image.new("RGB", (2, 2), (9, 9, 9))
    image.info["transparency"] = key
    assert (rgb_of(image) == 9).all()


# More than 8 bits


def gray(values: np.ndarray, kind: str = "TIFF", **options: Any) -> np.ndarray:
    """Levels of a saved gray image; all bands are equal."""
    rgb = rgb_of(saved(Image.fromarray(values), kind, **options))
    assert (rgb == rgb[:, :, :1]).all()
    return rgb[:, :, 0]


def tags(types: dict[int, int], **values: Any) -> TiffImagePlugin.ImageFileDirectory_v2:
    found = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in values.items():
        number = int(tag.removeprefix("tag"))
        found[number] = value
        if number in types:
            found.tagtype[number] = types[number]
    return found


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_by_65535(kind: str) -> None:
    values = np.append(RAMP * 257, [127, 128, 129, 385, 386, 65534]).astype(np.uint16)[None]
    expected = [*range(256), 0, 0, 1, 1, 2, 255]
    assert gray(values, kind).ravel().tolist() == expected


@pytest.mark.parametrize("dtype", ["<u2", "<f4"])
def test_white_may_be_zero(dtype: str) -> None:
    found = gray((RAMP * 257).astype(dtype), tiffinfo=tags({}, tag262=0))
    np.testing.assert_array_equal(found, 255 - RAMP)


@pytest.mark.parametrize("low", [0, -70000, -(2**31)])
@pytest.mark.parametrize("step", [1, 257, 2**20])
def test_32_bits_are_scaled_by_their_range(low: int, step: int) -> None:
    np.testing.assert_array_equal(gray((RAMP * step + low).astype(np.int32)), RAMP)


@pytest.mark.parametrize(("low", "step"), [(0, 1 / 255), (0, 1), (-3, 1e-6), (0, 1e36), (5, -2)])
def test_floats_are_scaled_by_their_range(low: float, step: float) -> None:
    values = (RAMP * step + low).astype(np.float32)
    expected = RAMP if step > 0 else RAMP[::-1, ::-1]
    assert np.abs(gray(values) - expected).max() <= (0 if step != 1e-6 else 40)


@pytest.mark.parametrize("pair", [(340, 341), (280, 281)])
def test_a_stated_range_is_used(pair: tuple[int, int]) -> None:
    types = dict.fromkeys((340, 341), 11)  # FLOAT
    stated = {f"tag{pair[0]}": 0, f"tag{pair[1]}": 3}
    found = gray((RAMP / 255).astype(np.float32), tiffinfo=tags(types, **stated))
    np.testing.assert_array_equal(found, np.rint(RAMP / 3))


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 0.0), (0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_a_stated_range_that_is_none_is_not_used(low: float, high: float) -> None:
    stated = tags({340: 11, 341: 11}, tag340=low, tag341=high)
    np.testing.assert_array_equal(gray((RAMP - 9).astype(np.float32), tiffinfo=stated), RAMP)


def test_a_constant_image_has_a_level_if_it_states_a_range() -> None:
    values = np.full((4, 4), 0.25, dtype=np.float32)
    stated = tags({340: 11, 341: 11}, tag340=0.0, tag341=1.0)
    assert (gray(values, tiffinfo=stated) == 64).all()
    with pytest.raises(PixelError, match=r"all its values are 0.25, and it states no range"):
        gray(values)


def test_values_that_are_no_numbers_are_white_and_infinite_ones_the_ends() -> None:
    values = RAMP.astype(np.float32)
    values[5, :3] = np.nan, np.inf, -np.inf
    assert gray(values)[5, :4].tolist() == [255, 255, 0, 83]
    with pytest.raises(PixelError, match="none of its values is a number"):
        gray(np.full((4, 4), np.nan, dtype=np.float32))


def test_the_values_of_12_bits_are_scaled_by_4095() -> None:
    image = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    image.tag_v2 = {258: (12,)}  # type: ignore[attr-defined]  # as of a TIFF that Pillow cannot write
    assert rgb_of(image)[0].tolist() == [[0, 0, 0], WHITE]


# Colours


def profile(space: bytes, gamma: float = 1.0, name: bytes = b"test") -> bytes:
    """An ICC profile with sRGB's primaries (or gray) and another tone curve."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78)
    found = {b"desc": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    if space == b"GRAY":
        found[b"kTRC"] = curve
    else:
        primaries = (
            (0.43607, 0.22249, 0.01392),
            (0.38515, 0.71687, 0.09708),
            (0.14307, 0.06061, 0.7141),
        )
        for letter, xyz in zip("rgb", primaries, strict=True):
            found[f"{letter}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(*xyz)
            found[f"{letter}TRC".encode()] = curve
    body, table = b"", b""
    for tag, data in found.items():
        table += tag + struct.pack(">II", 132 + 12 * len(found) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 132 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += fixed(0.9642, 1, 0.8249) + bytes(48)
    return header + struct.pack(">I", len(found)) + table + body


def to_srgb(level: np.ndarray) -> np.ndarray:
    """Linear levels 0 to 255 as sRGB's, by the formula of IEC 61966-2-1."""
    share = level / 255
    return 255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16"])
def test_a_profile_is_applied(mode: str) -> None:
    levels = RAMP.astype(np.uint8)
    image = Image.fromarray((RAMP * 257).astype(np.uint16) if mode == "I;16" else levels)
    image = image if mode == "I;16" else image.convert(mode)
    space = b"GRAY" if mode in ("L", "LA", "I;16") else b"RGB "
    kind = "WEBP" if mode == "RGBA" else "PNG"
    linear = saved(image, kind, icc_profile=profile(space), lossless=True)
    expected = to_srgb(RAMP)[:, :, None]
    assert np.abs(rgb_of(linear) - expected).max() <= 1.5  # littleCMS computes in 8 to 16 bits
    linear.info.pop("icc_profile")
    assert np.abs(rgb_of(linear) - RAMP[:, :, None]).max() == 0


def test_the_option_ignores_profiles() -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("RGB")
    image.save(buffer, "PNG", icc_profile=profile(b"RGB "))
    ignored = decode_image(buffer.getvalue(), "x", ImageOptions(profiles="ignore"))
    np.testing.assert_array_equal(rgb_of(ignored), np.asarray(image))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 200,
        bytes(200),
        profile(b"RGB ")[:200],
        profile(b"RGB ")[:128] + bytes(4),
        profile(b"GRAY"),
        profile(b"CMYK"),
        profile(b"RGB ", name=b"sRGB IEC61966-2.1"),
        profile(b"RGB ").replace(b"rTRC", b"xTRC"),
        profile(b"RGB ") + bytes(pixels.LARGEST_PROFILE_BYTES),
        None,
        7,
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored(data: object) -> None:
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("RGB")
    image.info["icc_profile"] = data
    np.testing.assert_array_equal(rgb_of(image), np.asarray(image))


def test_lab_has_the_colours_of_rgb() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 200], [128, 128, 128]]], dtype=np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(colours), srgb, lab, outputMode="LAB")
    assert image is not None
    for found in (image, saved(image, "TIFF")):
        assert np.abs(rgb_of(found).astype(int) - colours).max() <= 14  # 8 bits of LAB are coarse


def test_cmyk_of_adobe_is_not_inverted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(rgb_of(saved(image, kind)) - [255, 0, 0]).max() <= 2


# Frames, orientation, sizes


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    found = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert (rgb_of(found) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_orientation(orientation: int, mode: str) -> None:
    image = all_pairs().crop((0, 0, 5, 3))
    plain = image.convert("RGB") if mode == "RGB" else image
    if mode == "I;16":
        plain = Image.fromarray(np.arange(15, dtype=np.uint16).reshape(3, 5) * 4000)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(plain, "PNG", exif=exif)
    expected = Image.fromarray(rgb_of(plain))
    expected.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(rgb_of(found), np.asarray(ImageOps.exif_transpose(expected)))


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
@pytest.mark.parametrize("mode", ["1", "L", "RGBA", "P", "CMYK"])
def test_thin_images(size: tuple[int, int], mode: str) -> None:
    assert upright_rgb(Image.new(mode, size)).size == size
