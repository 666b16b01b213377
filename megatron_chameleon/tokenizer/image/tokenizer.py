"""The image tokenizer: PIL images to image codes and back.

    python -c "
    from PIL import Image; from megatron_chameleon.tokenizer import ImageTokenizer
    tokenizer = ImageTokenizer.load('runs/digits/tokenizer')
    print(tokenizer.encode([Image.open('cat.png')]))"

This is the only place that defines how an image is prepared; training the VQGAN uses it too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import open_to_read, write_together
from megatron_chameleon.images.pixels import upright_rgb
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_WEIGHTS_FILE,
    read_checked_json,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.values import Values, printable

FORMAT = "megatron_chameleon.image_tokenizer/1"
MADE_BY = "chameleon tokenizer image"

PIXELS_OF_A_PASS = 2**16
LARGEST_BATCH = 8
"""Measured on CPU: beyond either limit, larger passes take no less time per image."""

GPU_BATCH = 32
NO_DECODER = (
    "it has no decoder, so images can be read and not drawn",
    "Give a tokenizer folder that has one, ours or Meta's, with --tokenizer",
)
"""What is wrong and what to do where an image is asked for."""
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LARGEST_RATIO = 16
"""Images with a larger aspect ratio lose their ends before they are resized, because enlarging a
very thin image would take gigabytes."""


def prepare_image(image: Image.Image, resolution: int, *, pad: bool = False) -> np.ndarray:
    """Turn an image into RGB on white, upright; resize it to cover a square, and crop the centre.

    Args:
        image: Any PIL image, of any mode and size (``images/pixels.py`` says what its pixels are).
        resolution: Width and height of the result in pixels.
        pad: Resize the whole image to fit into the square, with a white border, instead of cropping
            (paper, section 3.2: images in prompts).

    Returns:
        RGB, uint8 [resolution, resolution, 3].

    Source: ``image_tokenizer.py`` of the reference code. It rounds the longer side, as we do here;
    Hugging Face's processor truncates it, which shifts the crop of some images by one pixel.
    """
    if pad:
        return np.asarray(_with_border(upright_rgb(image), resolution))
    rgb = _without_ends(upright_rgb(image))
    scale = resolution / min(rgb.size)
    width, height = (max(resolution, round(side * scale)) for side in rgb.size)
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def _with_border(rgb: Image.Image, resolution: int) -> Image.Image:
    """The whole image in the middle of a white square.

    Pillow's ``ImageOps.pad`` does the same, except for images so thin that a side rounds to 0.
    """
    scale = resolution / max(rgb.size)
    width, height = (max(1, round(side * scale)) for side in rgb.size)
    square = Image.new("RGB", (resolution, resolution), "white")
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(resized, ((resolution - width) // 2, (resolution - height) // 2))
    return square


def to_pixels(images_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W]: 0 becomes -1 and 255 becomes 1."""
    return scale_pixels(torch.tensor(images_NHWC).permute(0, 3, 1, 2)).contiguous()


def scale_pixels(bytes_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 of the same shape and order: 0 becomes -1 and 255 becomes 1."""
    return bytes_NCHW.float().mul(2 / 255).sub(1)


def to_images(pixels_BCHW: torch.Tensor) -> list[Image.Image]:
    """The inverse of ``to_pixels``; values outside [-1, 1] are clamped."""
    scaled = pixels_BCHW.float().clamp(-1, 1).add(1).mul(255 / 2).round().to(torch.uint8)
    return [Image.fromarray(array) for array in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def _without_ends(image: Image.Image) -> Image.Image:
    longest = LARGEST_RATIO * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ImageTokenizer:
    """A trained VQGAN on one device.

    Args:
        model: The network. Its weights are converted to ``dtype`` in place.
        device: Where it runs. On a GPU, channels are last in memory.
        dtype: Type of the convolutions. bf16 is for GPUs: it is several times as fast, and one code
            in a hundred differs. The distances from the codebook are always fp32.
        compiler: Backend of ``torch.compile``; None does not compile.

    The codes of an image do not depend on the other images in its batch. Convolution libraries
    choose their algorithm by shape, so latents would differ by 1e-6 between batch sizes, and a code
    on the border between two codebook vectors would flip. Therefore every pass has the same number
    of images, and the last one is filled up.
    """

    def __init__(
        self,
        model: Vqgan,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiler: str | None = None,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.config = model.config
        self.device = torch.device(device)
        fill = PIXELS_OF_A_PASS // model.config.resolution**2
        on_cpu = self.device.type == "cpu"
        order = torch.contiguous_format if on_cpu else torch.channels_last
        if not on_cpu or dtype != torch.float32:
            model.convolve_in(dtype, order)
        if compiler is not None:
            model.compile_networks(compiler)
        self.batch_size = min(max(fill, 1), LARGEST_BATCH) if on_cpu else GPU_BATCH

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ImageTokenizer":
        """Read FOLDER/image.json and FOLDER/image.safetensors.

        Raises:
            DataError: If one of them is missing or unreadable, or they do not belong together.
        """
        config = read_vqgan_config(folder)
        path = tokenizer_file(folder, IMAGE_WEIGHTS_FILE)
        remedy = f"Make it with `{MADE_BY}`"
        try:
            open_to_read(path).close()
            weights = load_file(path)
        except DataError as error:
            raise DataError(error.where, error.what, remedy) from error
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(
                str(path), f"cannot be read ({first_line(error)[:200]})", remedy
            ) from error
        has_decoder = any(name.startswith("decoder.") for name in weights)
        with torch.device("meta"):
            model = Vqgan(config, has_decoder=has_decoder)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        if wrong:
            name = wrong[0]
            raise DataError(
                str(path),
                f"{len(wrong)} tensors do not fit {IMAGE_CONFIG_FILE}: "
                f"{printable(name)} is {found.get(name, 'missing')}, "
                f"the config needs {expected.get(name, 'none')}",
                f"Copy both files from the same `{MADE_BY}` run",
            )
        for name, tensor in weights.items():
            if tensor.dtype not in _WEIGHT_DTYPES:
                what = f"{name} is {tensor.dtype}, which is not a type of weights"
                raise DataError(str(path), what, remedy)
        model.load_state_dict(weights, assign=True)
        return cls(model, device, dtype)

    @property
    def resolution(self) -> int:
        """Width and height of an image in pixels."""
        return self.config.resolution

    @property
    def codes_per_image(self) -> int:
        return self.config.codes_per_image

    @property
    def has_decoder(self) -> bool:
        """Whether it can turn codes into images; transformers' weights have no decoder."""
        return self.model.has_decoder

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Encode images; the codes of one image do not depend on the others.

        Args:
            images: Any sizes and modes.

        Returns:
            int64 [len(images), codes_per_image], in [0, codebook_size), row-major.

        Raises:
            DataError: If an image cannot be decoded.
        """
        codes = np.empty((len(images), self.codes_per_image), dtype=np.int64)
        running: tuple[int, int, torch.Tensor] | None = None
        for start in range(0, len(images), self.batch_size):
            indices = range(start, min(start + self.batch_size, len(images)))
            batch = np.stack([self._prepare(index, images[index]) for index in indices])
            # a GPU still encodes while the CPU prepares the next images
            if running is not None:
                _fetch(codes, *running)
            running = (start, len(batch), self._submit(batch))
        if running is not None:
            _fetch(codes, *running)
        return codes

    def encode_prepared(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Encode at most ``batch_size`` images that ``prepare_image`` has prepared.

        Args:
            images_NHWC: uint8 [N, resolution, resolution, 3].

        Returns:
            int64 [N, codes_per_image], in [0, codebook_size), row-major.
        """
        return self._submit(images_NHWC)[: len(images_NHWC)].cpu().numpy()

    @torch.inference_mode()
    def _submit(self, images_NHWC: np.ndarray) -> torch.Tensor:
        """Start a full pass: its codes on the device, on which a GPU may still be working."""
        shape = (self.batch_size, *images_NHWC.shape[1:])
        full = np.resize(images_NHWC, shape)  # repeats images to fill the pass up
        if self.device.type == "cpu":
            return self.model.encode(to_pixels(full))
        # copies bytes, not floats, from memory that the GPU can read by itself
        bytes_NHWC = torch.from_numpy(full).pin_memory().to(self.device, non_blocking=True)
        return self.model.encode(scale_pixels(bytes_NHWC.permute(0, 3, 1, 2)))

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Turn image codes into images.

        Args:
            codes: Integers [n, codes_per_image] in [0, codebook_size), row-major.

        Raises:
            DataError: If the shape or a value does not fit this tokenizer, or it has no decoder.
        """
        if not self.has_decoder:
            raise DataError("image tokenizer", *NO_DECODER)
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise DataError(
                "image codes",
                f"the shape is {codes.shape}, not (n, {self.codes_per_image})",
                "Pass the codes of whole images, one row each",
            )
        if codes.size and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise DataError(
                "image codes",
                f"values from {codes.min()} to {codes.max()} are outside [0, {self.codebook_size})",
                "Pass image codes, not token ids",
            )
        images: list[Image.Image] = []
        for start in range(0, len(codes), self.batch_size):
            batch = torch.tensor(
                codes[start : start + self.batch_size], dtype=torch.int64, device=self.device
            )
            images += to_images(self.model.decode(batch))
        return images

    def _prepare(self, index: int, image: Image.Image) -> np.ndarray:
        try:
            return prepare_image(image, self.resolution)
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions
            raise unreadable_image(f"image {index}", error) from error


def _fetch(codes: np.ndarray, start: int, count: int, found: torch.Tensor) -> None:
    codes[start : start + count] = found[:count].cpu().numpy()


def unreadable_image(where: str, error: Exception) -> DataError:
    """The error for image bytes that Pillow cannot turn into pixels."""
    problem = (str(error).splitlines() or [""])[0] or type(error).__name__
    return DataError(where, f"the image cannot be decoded ({problem})", "Replace or remove it")


def read_vqgan_config(folder: str | Path) -> VqganConfig:
    """Read the network's shape from FOLDER/image.json.

    Raises:
        DataError: If the file is missing or unreadable, or does not describe a network.
    """
    path = tokenizer_file(folder, IMAGE_CONFIG_FILE)
    model = read_checked_json(path, FORMAT, MADE_BY).get("model")
    names = {item.name for item in fields(VqganConfig)}
    if not isinstance(model, dict) or set(model) != names:
        found = sorted(model) if isinstance(model, dict) else model
        raise DataError(
            str(path), f"`model` has {found}, not {sorted(names)}", f"Make it with `{MADE_BY}`"
        )
    remedy = f"Make it with `{MADE_BY}`"
    return vqgan_config(Values(model, f"{path}: model", remedy, DataError))


def vqgan_config(values: Values) -> VqganConfig:
    """The network's shape, from what a file states; missing values are the defaults.

    Raises:
        ChameleonError: Of the values' kind: a value cannot be, or two of them do not fit.
    """
    default = VqganConfig()
    factors = values.wholes("ch_mult", low=1, high=64, most=10) or default.ch_mult
    config = VqganConfig(
        resolution=values.whole("resolution", 1, 2**14, default.resolution),
        in_channels=values.whole("in_channels", 1, 64, default.in_channels),
        base_channels=values.whole("base_channels", 1, 2**12, default.base_channels),
        ch_mult=factors,
        num_res_blocks=values.whole("num_res_blocks", 1, 32, default.num_res_blocks),
        z_channels=values.whole("z_channels", 1, 2**14, default.z_channels),
        embed_dim=values.whole("embed_dim", 1, 2**14, default.embed_dim),
        codebook_size=values.whole("codebook_size", 2, 2**24, default.codebook_size),
        dropout=values.number("dropout", 0, 1, default.dropout),
    )
    try:
        config.check(values.where)
    except ConfigError as error:
        raise values.error(f"{error.where.removeprefix(values.where)[2:]}: {error.what}") from error
    return config


def save_vqgan(model: Vqgan, folder: str | Path, details: Mapping[str, Any] | None = None) -> None:
    """Write FOLDER/image.safetensors, then FOLDER/image.json: if it exists, both are complete.

    Args:
        model: The network.
        folder: The tokenizer folder; created if it is missing.
        details: What else image.json says, apart from the shape of the network: how it was trained.

    Raises:
        DataError: If the file system refuses them; older files in the folder then remain.
    """
    folder = Path(folder)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "model": vqgan_config_to_json(model.config), **(details or {})}
    write_together(
        {
            folder / IMAGE_CONFIG_FILE: (json.dumps(content, indent=2) + "\n").encode(),
            folder / IMAGE_WEIGHTS_FILE: to_safetensors(weights),
        }
    )


def vqgan_config_to_json(config: VqganConfig) -> dict[str, object]:
    """The ``model`` part of image.json."""
    return asdict(config)
