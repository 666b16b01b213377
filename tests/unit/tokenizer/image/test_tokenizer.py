import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.image import tokenizer as image_module
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.tokenizer import (
    ImageTokenizer,
    _without_ends,
    prepare_image,
    to_images,
    to_pixels,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig

Noise = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> ImageTokenizer:
    return ImageTokenizer.load(tokenizer_folder)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_an_image_of_the_right_size_is_left_alone(noise: Noise) -> None:
    image = noise()
    np.testing.assert_array_equal(prepare_image(image, 16), np.asarray(image))


@pytest.mark.parametrize(
    "size", [(40, 16), (16, 40), (37, 23), (7, 9), (1, 1), (1, 5000), (300, 2)]
)
def test_any_size_becomes_a_square(noise: Noise, size: tuple[int, int]) -> None:
    assert prepare_image(noise(size=size), 16).shape == (16, 16, 3)


def test_a_thin_image_is_cut_before_it_is_enlarged() -> None:
    """One pixel by 200,000 would become 512 by 100 million."""
    assert _without_ends(Image.new("RGB", (1, 200_000)), (16, 16)).size == (1, 16)
    assert _without_ends(Image.new("RGB", (200_000, 3)), (16, 16)).size == (48, 3)
    image = Image.new("RGB", (2, 300), "red")
    image.paste("blue", (0, 149, 2, 151))
    assert (prepare_image(image, 2) == [0, 0, 255]).all()


def test_the_centre_is_what_stays() -> None:
    image = Image.new("RGB", (48, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    assert (prepare_image(image, 16) == [0, 0, 255]).all()


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    grey = Image.new("LA", (16, 16), (0, 0))
    palette = Image.new("P", (16, 16), 0)
    palette = Image.open(io.BytesIO(encoded(palette, "GIF", transparency=0)))
    for image in (clear, grey, palette):
        assert (prepare_image(image, 16) == 255).all()
    assert (prepare_image(half, 16) == [255, 127, 127]).all()


def test_other_modes_become_rgb() -> None:
    assert (prepare_image(Image.new("L", (16, 16), 77), 16) == 77).all()
    assert (prepare_image(Image.new("1", (16, 16), 1), 16) == 255).all()
    assert (prepare_image(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), 16) == 255).all()
    sixteen_bits = Image.fromarray(np.full((16, 16), 0x4D00, dtype=np.uint16))
    assert (prepare_image(sixteen_bits, 16) == 0x4D).all()


def test_the_camera_s_orientation_is_followed() -> None:
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 8  # turned by a quarter: the right side of the file is the top
    turned = Image.open(io.BytesIO(encoded(image, exif=exif)))
    prepared = prepare_image(turned, 16)
    assert prepared[0, 8].tolist() == [0, 0, 255] and prepared[15, 8].tolist() == [255, 0, 0]


def test_a_broken_exif_block_does_not_cost_the_image(noise: Noise) -> None:
    image = noise()
    broken = Image.open(io.BytesIO(encoded(image, exif=b"Exif\0\0no TIFF header")))
    np.testing.assert_array_equal(prepare_image(broken, 16), np.asarray(image))


def test_pixels_span_minus_one_to_one_and_come_back() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(values)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    np.testing.assert_array_equal(np.asarray(to_images(pixels)[0]), values[0])
    assert np.asarray(to_images(torch.full((1, 3, 2, 2), 7.0))[0]).max() == 255


def test_codes_have_the_promised_shape(tokenizer: ImageTokenizer, noise: Noise) -> None:
    assert (tokenizer.resolution, tokenizer.codes_per_image, tokenizer.codebook_size) == (
        16,
        16,
        32,
    )
    codes = tokenizer.encode([noise(seed) for seed in range(3)])
    assert codes.shape == (3, 16) and codes.dtype == np.int64
    assert len(np.unique(codes)) > 4  # if all were equal, what follows could not fail
    assert tokenizer.encode([]).shape == (0, 16)
    images = tokenizer.decode(codes)
    assert [image.size for image in images] == [(16, 16)] * 3 and images[0].mode == "RGB"
    assert tokenizer.decode(np.empty((0, 16), dtype=np.int64)) == []


def test_latents_do_not_depend_on_the_neighbours(
    tokenizer: ImageTokenizer, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit. Codes could agree by luck, because few latents lie between two codes."""
    seen: list[torch.Tensor] = []
    latents = tokenizer.model.latents

    def spy(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(latents(pixels))
        return seen[-1]

    monkeypatch.setattr(tokenizer.model, "latents", spy)
    images = [noise(seed) for seed in range(19)]
    together = tokenizer.encode(images)
    in_company = torch.cat(seen)
    for index in (0, 7, 8, 18):
        seen.clear()
        np.testing.assert_array_equal(tokenizer.encode([images[index]])[0], together[index])
        assert torch.equal(seen[0][0], in_company[index])


def test_the_next_images_are_prepared_before_codes_are_waited_for(
    tokenizer: ImageTokenizer, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(name: str, function: Callable) -> Callable:
        def noted(*args: object) -> object:
            events.append(name)
            return function(*args)

        return noted

    monkeypatch.setattr(tokenizer, "_prepare", note("prepare", tokenizer._prepare))
    monkeypatch.setattr(tokenizer, "_submit", note("submit", tokenizer._submit))
    monkeypatch.setattr(image_module, "_fetch", note("fetch", image_module._fetch))
    full = tokenizer.batch_size
    tokenizer.encode([noise(seed) for seed in range(2 * full + 1)])
    batches = [["prepare"] * count for count in (full, full, 1)]
    one, two, three = ([*batch, "submit"] for batch in batches)
    assert events == [*one, *two[:-1], "fetch", "submit", *three[:-1], "fetch", "submit", "fetch"]


def test_bf16_gives_nearly_the_same_codes(
    tokenizer_folder: Path, tokenizer: ImageTokenizer, noise: Noise
) -> None:
    images = [noise(seed) for seed in range(9)]
    other = ImageTokenizer(ImageTokenizer.load(tokenizer_folder).model, dtype=torch.bfloat16)
    assert (other.encode(images) == tokenizer.encode(images)).mean() > 0.9
    codes = tokenizer.encode(images)
    pairs = zip(other.decode(codes), tokenizer.decode(codes), strict=True)
    levels = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
    assert 0 < np.mean(levels) < 2


def test_saved_and_loaded_it_gives_the_same_codes(
    tokenizer: ImageTokenizer, noise: Noise, tmp_path: Path
) -> None:
    save_vqgan(tokenizer.model, tmp_path, {"seed": 5})
    images = [noise(3)]
    loaded = ImageTokenizer.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))
    assert json.loads((tmp_path / "image.json").read_text())["seed"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.json", "image.safetensors"]


def test_an_image_that_cannot_be_decoded_is_named(tokenizer: ImageTokenizer, noise: Noise) -> None:
    content = encoded(noise(size=(64, 64)))
    truncated = Image.open(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(DataError, match=r"image 1: the image cannot be decoded \(.*truncated"):
        tokenizer.encode([noise(), truncated])


def test_codes_that_do_not_fit_are_refused(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(DataError, match=r"the shape is \(2, 15\), not \(n, 16\)"):
        tokenizer.decode(np.zeros((2, 15), dtype=np.int64))
    with pytest.raises(DataError, match=r"values from 0 to 32 are outside \[0, 32\)"):
        tokenizer.decode(np.array([[0] * 15 + [32]]))


def test_files_that_are_missing_or_broken_are_named(new_tokenizer_folder: Path) -> None:
    weights, config = (new_tokenizer_folder / f"image.{kind}" for kind in ("safetensors", "json"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"image.safetensors: cannot be read"):
        ImageTokenizer.load(new_tokenizer_folder)
    weights.unlink()
    with pytest.raises(
        DataError, match=r"image.safetensors: no such file.*chameleon tokenizer image"
    ):
        ImageTokenizer.load(new_tokenizer_folder)
    config.write_text('{"format": "megatron_chameleon.image_tokenizer/1", "model": {"width": 3}}')
    with pytest.raises(DataError, match=r"image.json: `model` has \['width'\], not"):
        ImageTokenizer.load(new_tokenizer_folder)
    config.unlink()
    with pytest.raises(DataError, match=r"image.json: no such file"):
        ImageTokenizer.load(new_tokenizer_folder)


def test_weights_of_another_shape_are_refused(new_tokenizer_folder: Path, tmp_path: Path) -> None:
    save_vqgan(Vqgan(VqganConfig(16, 3, 32, [1, 1, 1], 1, 8, 12, 32)), tmp_path / "other")
    other = (tmp_path / "other" / "image.safetensors").read_bytes()
    (new_tokenizer_folder / "image.safetensors").write_bytes(other)
    with pytest.raises(
        DataError,
        match=r"4 tensors do not fit image.json: post_quant_conv.weight is \(8, 12, 1, 1\), "
        r"the config needs \(8, 8, 1, 1\)",
    ):
        ImageTokenizer.load(new_tokenizer_folder)
