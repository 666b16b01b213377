"""The image tokenizer: PIL images to image codes and back.

    python -c "
    from PIL import Image; from megatron_chameleon.tokenizer import ImageTokenizer
    tokenizer = ImageTokenizer.load('runs/digits/tokenizer')
    print(tokenizer.encode([Image.open('cat.png')]))"

This is the only place that defines how an image is prepared; training the VQGAN uses it too.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.images.pixels import upright_rgb
from megatron_chameleon.tokenizer.image.network import (
    FROM_MINUS_ONE_TO_ONE,
    ImageNetwork,
    PixelRule,
)
from megatron_chameleon.tokenizer.image.stored import load_network
from megatron_chameleon.tokenizer.image.vqgan import Vqgan

PIXELS_OF_A_PASS = 2**16
LARGEST_BATCH = 8
"""Measured on CPU: beyond either limit, larger passes take no less time per image."""

GPU_BATCH = 32
NO_DECODER = (
    "it has no decoder, so images can be read and not drawn",
    "Give a tokenizer folder that has one, ours or Meta's, with --tokenizer",
)
"""What is wrong and what to do where an image is asked for."""

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
    return numbers_of(images_NHWC, FROM_MINUS_ONE_TO_ONE)


def numbers_of(images_NHWC: np.ndarray, rule: PixelRule) -> torch.Tensor:
    """uint8 [N, H, W, 3] to the numbers that a network with this rule reads: [N, 3, H, W]."""
    return rule.to_floats(torch.tensor(images_NHWC).permute(0, 3, 1, 2)).contiguous()


def to_images(
    pixels_BCHW: torch.Tensor, rule: PixelRule = FROM_MINUS_ONE_TO_ONE
) -> list[Image.Image]:
    """The inverse of ``numbers_of``; values beyond black and white are clamped."""
    values = rule.to_bytes(pixels_BCHW)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def _without_ends(image: Image.Image) -> Image.Image:
    longest = LARGEST_RATIO * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ImageTokenizer:
    """A trained network that turns images into codes, on one device.

    Args:
        model: The network: a ``Vqgan``, or another one. Its weights are converted to ``dtype`` in
            place.
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
        model: ImageNetwork,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiler: str | None = None,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        fill = PIXELS_OF_A_PASS // model.resolution**2
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
        model = load_network(folder)
        return cls(model, device, dtype)

    @property
    def resolution(self) -> int:
        """Width and height of an image in pixels."""
        return self.model.resolution

    @property
    def grid(self) -> int:
        """Codes per image along each axis."""
        return self.model.resolution // self.model.downsampling

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    @property
    def has_decoder(self) -> bool:
        """Whether it can turn codes into images; transformers' weights have no decoder."""
        return self.model.has_decoder

    @property
    def vqgan(self) -> Vqgan | None:
        """The network if it is a ``Vqgan``, which Meta's and Hugging Face's Chameleon have."""
        return self.model if isinstance(self.model, Vqgan) else None

    @property
    def codebook_size(self) -> int:
        return self.model.codebook_size

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
        rule = self.model.pixel_rule
        full = np.resize(images_NHWC, shape)  # repeats images to fill the pass up
        if self.device.type == "cpu":
            return self.model.encode(numbers_of(full, rule))
        # copies bytes, not floats, from memory that the GPU can read by itself
        bytes_NHWC = torch.from_numpy(full).pin_memory().to(self.device, non_blocking=True)
        return self.model.encode(rule.to_floats(bytes_NHWC.permute(0, 3, 1, 2)))

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
            pixels = self.model.decode(batch, self.grid, self.grid)
            images += to_images(pixels, self.model.pixel_rule)
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
