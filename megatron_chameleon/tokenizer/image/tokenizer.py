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
from megatron_chameleon.tokenizer.common.grids import Grid, Shapes
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
GPU_SHAPED_BATCH = 8
"""With shapes a pass has images of one grid, so larger ones would often be filled up."""
_ONLY_SQUARES = (
    "Use a vocabulary made without --image-grids, or an image tokenizer that takes other shapes"
)
NO_DECODER = (
    "it has no decoder, so images can be read and not drawn",
    "Give a tokenizer folder that has one, ours or Meta's, with --tokenizer",
)
"""What is wrong and what to do where an image is asked for."""

LARGEST_RATIO = 16
"""Images that are thinner than the result by more than this factor lose their ends before they are
resized, because enlarging a very thin image would take gigabytes."""


def prepare_image(
    image: Image.Image, resolution: int | tuple[int, int], *, pad: bool = False
) -> np.ndarray:
    """Turn an image into RGB on white, upright; resize it to cover a square, and crop the centre.

    Args:
        image: Any PIL image, of any mode and size (``images/pixels.py`` says what its pixels are).
        resolution: Width and height of the result in pixels; one number for a square.
        pad: Resize the whole image to fit into the result, with a white border, instead of cropping
            (paper, section 3.2: images in prompts).

    Returns:
        RGB, uint8 [height, width, 3].

    Source: ``image_tokenizer.py`` of the reference code. It rounds the longer side, as we do here;
    Hugging Face's processor truncates it, which shifts the crop of some images by one pixel.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    return _fit(upright_rgb(image), size, pad)


def _fit(rgb: Image.Image, size: tuple[int, int], pad: bool) -> np.ndarray:
    """An upright image at this width and height, cropped or with a border."""
    if pad:
        return np.asarray(_with_border(rgb, size))
    rgb = _without_ends(rgb, size)
    scale = max(wanted / side for wanted, side in zip(size, rgb.size, strict=True))
    width, height = (
        max(wanted, round(side * scale)) for wanted, side in zip(size, rgb.size, strict=True)
    )
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return np.asarray(resized.crop((left, top, left + size[0], top + size[1])))


def _with_border(rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image in the middle of a white area.

    Pillow's ``ImageOps.pad`` does the same, except for images so thin that a side rounds to 0.
    """
    scale = min(wanted / side for wanted, side in zip(size, rgb.size, strict=True))
    width, height = (max(1, round(side * scale)) for side in rgb.size)
    area = Image.new("RGB", size, "white")
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS)
    area.paste(resized, ((size[0] - width) // 2, (size[1] - height) // 2))
    return area


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


def _without_ends(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What is left of an image that is much thinner than the area that it will cover."""
    across, down = size
    width = min(image.width, max(1, LARGEST_RATIO * image.height * across // down))
    height = min(image.height, max(1, LARGEST_RATIO * image.width * down // across))
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
        shapes: The grids that images may have; None: all become the network's square.

    Raises:
        DataError: The network takes only its square, and there are shapes.

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
        shapes: Shapes | None = None,
    ) -> None:
        _check_shapes(model, shapes, "image tokenizer")
        self.shapes = shapes
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        codes = (model.resolution // model.downsampling) ** 2
        codes = shapes.largest_codes if shapes else codes
        fill = PIXELS_OF_A_PASS // (codes * model.downsampling**2)
        on_cpu = self.device.type == "cpu"
        order = torch.contiguous_format if on_cpu else torch.channels_last
        if not on_cpu or dtype != torch.float32:
            model.convolve_in(dtype, order)
        if compiler is not None:
            model.compile_networks(compiler)
        self.batch_size = min(max(fill, 1), LARGEST_BATCH) if on_cpu else GPU_BATCH
        if shapes is not None and not on_cpu:
            self.batch_size = GPU_SHAPED_BATCH

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        shapes: Shapes | None = None,
    ) -> "ImageTokenizer":
        """Read FOLDER/image.json and FOLDER/image.safetensors.

        Raises:
            DataError: If one of them is missing or unreadable, or they do not belong together.
        """
        model = load_network(folder)
        _check_shapes(model, shapes, str(folder))
        return cls(model, device, dtype, shapes=shapes)

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
    def grids(self) -> tuple[Grid, ...]:
        """The grids of codes that an image may have: with shapes several, else the square."""
        return self.shapes.grids if self.shapes else (Grid(self.grid, self.grid),)

    @property
    def largest_codes(self) -> int:
        """The codes of the largest grid; ``codes_per_image`` without shapes."""
        return max(grid.codes for grid in self.grids)

    def size_of(self, grid: Grid) -> tuple[int, int]:
        """Width and height in pixels of an image with this grid."""
        step = self.model.downsampling
        return grid.columns * step, grid.rows * step

    @property
    def has_decoder(self) -> bool:
        """Whether it can turn codes into images; transformers' weights have no decoder."""
        return self.model.has_decoder

    @property
    def vqgan(self) -> Vqgan | None:
        """The network if it is a ``Vqgan`` with a codebook to search in.

        Meta's and Hugging Face's Chameleon have such a network.
        """
        is_theirs = isinstance(self.model, Vqgan) and self.model.config.quantizer == "vq"
        return self.model if is_theirs else None  # type: ignore[return-value]

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

    def prepare(self, image: Image.Image, *, pad: bool = False) -> tuple[Grid, np.ndarray]:
        """Choose the grid of an image, and bring the image to its size.

        With shapes, it is the grid with the nearest aspect ratio, and only what does not fit that
        ratio is cropped. An image that is longer than the longest grid keeps all of itself, with a
        white border.

        Args:
            image: Any PIL image.
            pad: Add a white border instead of cropping.

        Returns:
            The grid, and RGB, uint8 [height, width, 3] of ``size_of(grid)``.
        """
        if self.shapes is None:
            return self.grids[0], prepare_image(image, self.resolution, pad=pad)
        rgb = upright_rgb(image)
        grid = self.shapes.grid_of(*rgb.size)
        return grid, _fit(rgb, self.size_of(grid), pad or self.shapes.is_beyond(*rgb.size))

    def encode_shaped(self, images: Sequence[Image.Image]) -> list[tuple[Grid, np.ndarray]]:
        """Encode images, each in its own grid; the codes of one do not depend on the others.

        Args:
            images: Any sizes and modes.

        Returns:
            For each image its grid, and int64 [grid.codes] in [0, codebook_size), row-major.

        Raises:
            DataError: If an image cannot be decoded.
        """
        results: list[tuple[Grid, np.ndarray]] = [(Grid(0, 0), np.empty(0))] * len(images)
        waiting: dict[Grid, list[tuple[int, np.ndarray]]] = {}
        for index, image in enumerate(images):
            try:
                grid, pixels = self.prepare(image)
            except Exception as error:  # Pillow's decoders raise all kinds of exceptions
                raise unreadable_image(f"image {index}", error) from error
            group = waiting.setdefault(grid, [])
            group.append((index, pixels))
            if len(group) == self.batch_size:
                self._encode_group(grid, waiting.pop(grid), results)
        for grid, group in waiting.items():
            self._encode_group(grid, group, results)
        return results

    def _encode_group(
        self,
        grid: Grid,
        group: list[tuple[int, np.ndarray]],
        results: list[tuple[Grid, np.ndarray]],
    ) -> None:
        codes = self.encode_prepared(np.stack([pixels for _, pixels in group]))
        for (index, _), found in zip(group, codes, strict=True):
            results[index] = (grid, found)

    def encode_prepared(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Encode at most ``batch_size`` images of one size that were prepared.

        Args:
            images_NHWC: uint8 [N, height, width, 3].

        Returns:
            int64 [N, rows * columns], in [0, codebook_size), row-major.
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

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Turn image codes into images.

        Args:
            codes: Integers [n, codes_per_image] in [0, codebook_size), row-major.

        Raises:
            DataError: If the shape or a value does not fit this tokenizer, or it has no decoder.
        """
        codes = np.asarray(codes)
        if self.has_decoder and (codes.ndim != 2 or codes.shape[1] != self.codes_per_image):
            raise DataError(
                "image codes",
                f"the shape is {codes.shape}, not (n, {self.codes_per_image})",
                "Pass the codes of whole images, one row each",
            )
        return self._decode(codes, Grid(self.grid, self.grid))

    def decode_shaped(self, pictures: Sequence[tuple[Grid, np.ndarray]]) -> list[Image.Image]:
        """Turn image codes into images, each of the size of its grid.

        Args:
            pictures: For each image its grid, and integers [grid.codes], row-major.

        Raises:
            DataError: The codes of an image do not fill its grid, the tokenizer does not have the
                grid, a value is no code, or it has no decoder.
        """
        groups: dict[Grid, list[int]] = {}
        for index, (grid, codes) in enumerate(pictures):
            grid = Grid(*grid)
            if grid not in self.grids or np.shape(codes) != (grid.codes,):
                what = f"image {index} has the grid {grid} and codes of shape {np.shape(codes)}; "
                what += f"the tokenizer has {len(self.grids)} grids, from {self.grids[0]} to "
                what += f"{self.grids[-1]}"
                raise DataError("image codes", what, "Pass the codes of whole images")
            groups.setdefault(grid, []).append(index)
        images: dict[int, Image.Image] = {}
        for grid, indices in groups.items():
            decoded = self._decode(np.stack([pictures[index][1] for index in indices]), grid)
            images |= zip(indices, decoded, strict=True)
        return [images[index] for index in range(len(pictures))]

    @torch.inference_mode()
    def _decode(self, codes: np.ndarray, grid: Grid) -> list[Image.Image]:
        """Images of one grid: codes [n, grid.codes]."""
        if not self.has_decoder:
            raise DataError("image tokenizer", *NO_DECODER)
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
            images += to_images(self.model.decode(batch, *grid), self.model.pixel_rule)
        return images

    def _prepare(self, index: int, image: Image.Image) -> np.ndarray:
        try:
            return prepare_image(image, self.resolution)
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions
            raise unreadable_image(f"image {index}", error) from error


def _check_shapes(model: ImageNetwork, shapes: Shapes | None, where: str) -> None:
    if shapes is not None and model.fixed_grid:
        side = model.resolution // model.downsampling
        what = f"its image tokenizer takes only squares of {side} x {side} codes, and its "
        what += f"vocabulary has {len(shapes.grids)} grids"
        raise DataError(where, what, _ONLY_SQUARES)


def _fetch(codes: np.ndarray, start: int, count: int, found: torch.Tensor) -> None:
    codes[start : start + count] = found[:count].cpu().numpy()


def unreadable_image(where: str, error: Exception) -> DataError:
    """The error for image bytes that cannot be turned into pixels, by us or by Pillow."""
    if isinstance(error, DataError):
        return DataError(where, error.what, error.remedy)
    problem = (str(error).splitlines() or [""])[0] or type(error).__name__
    return DataError(where, f"the image cannot be decoded ({problem})", "Replace or remove it")
