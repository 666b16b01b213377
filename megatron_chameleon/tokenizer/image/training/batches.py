"""Batches for training an image tokenizer: prepared images, drawn by weight and augmented.

What step ``s`` sees depends only on (images, config, seed, s).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_chameleon.errors import DataError, what_and_option
from megatron_chameleon.files import write_text, writing
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.tokenizer.image.config import ImageTrainingConfig
from megatron_chameleon.tokenizer.image.tokenizer import prepare_image, to_pixels, unreadable_image
from megatron_chameleon.tokenizer.image.training.processes import Processes
from megatron_chameleon.tokenizer.image.training_image import TrainingImage

READING_THREADS = 8
DROPPED_FILE = "image.dropped.jsonl"


class ImageSet:
    """Training images, prepared once and kept in memory as far as they fit.

    An unreadable image is dropped when it is first read. That is at the start if it fits in memory,
    and when it is drawn if it does not.

    Args:
        entries: The images.
        resolution: Width and height in pixels.
        cache_bytes: Memory for prepared images.
        processes: Those that share each batch.
    """

    def __init__(
        self,
        entries: Sequence[TrainingImage],
        resolution: int,
        cache_bytes: int,
        processes: Processes | None = None,
    ) -> None:
        self.entries = list(entries)
        self.processes = processes or Processes()
        self.resolution = resolution
        self.weights = np.array([entry.weight for entry in entries], dtype=np.float64)
        self.dropped: dict[int, str] = {}
        """Reason by index of the entry."""
        self._agreed: set[int] = set()
        """Of these, all processes know."""
        self._cache: dict[int, np.ndarray] = {}
        self.cached = min(len(self.entries), cache_bytes // (3 * resolution**2))
        """So many entries, the first ones, have been read and are in memory."""
        self._pool = ThreadPoolExecutor(READING_THREADS)
        for index, image in enumerate(self._pool.map(self._read, range(self.cached))):
            if image is not None:
                self._cache[index] = image
        self._agree()

    def __len__(self) -> int:
        return len(self.entries)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw images with replacement, in proportion to their weights.

        Returns:
            This process's share of them: RGB, uint8 [share, resolution, resolution, 3].

        Raises:
            DataError: If every image with a weight above 0 turned out to be unreadable, or a disk
                or network fails.
        """
        drawn: list[int] = []
        read: dict[int, np.ndarray] = {}
        while len(drawn) < count:
            if self.weights.sum() <= 0:
                raise self._nothing_left()
            share = self.weights / self.weights.sum()
            indices = rng.choice(len(share), size=count - len(drawn), p=share).tolist()
            read |= self._read_all(self.processes.share(indices))
            self._agree()
            drawn += [index for index in indices if index not in self.dropped]
        mine = self.processes.share(drawn)
        read |= self._read_all([index for index in mine if index not in read])
        return np.stack([self._drawn(index, read) for index in mine])

    def first(self, count: int) -> np.ndarray:
        """The first readable images: uint8 [at most count, resolution, resolution, 3]."""
        images = (self._get(index) for index in range(len(self.entries)))
        readable = (image for image in images if image is not None)
        found = [image for image, _ in zip(readable, range(count), strict=False)]
        shape = (0, self.resolution, self.resolution, 3)
        return np.stack(found) if found else np.empty(shape, dtype=np.uint8)

    def dropped_reasons(self) -> list[tuple[str, str]]:
        """The images that were left out, each with the reason."""
        return [(self.entries[index].where, why) for index, why in sorted(self.dropped.items())]

    def names_digest(self) -> str:
        """A hash of the names and weights of all images, in order."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.where}\0{entry.weight!r}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def pixels_digest(self, count: int) -> str:
        """A hash of the first images, which are in memory; unreadable ones have no pixels."""
        digest = hashlib.blake2b()
        for index in range(count):
            image = self._cache.get(index)
            digest.update(b"\0" if image is None else b"\1")
            if image is not None:
                digest.update(image.data)
        return digest.hexdigest()

    def drop(self, dropped: Mapping[int, str]) -> None:
        """Leave out images that an earlier start of the training could not read.

        Args:
            dropped: Reason by index of the entry.
        """
        self.dropped.update(dropped)
        self.weights[list(dropped)] = 0
        for index in dropped:
            self._cache.pop(index, None)

    def _read_all(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """The readable ones of some images, by index."""
        indices = list(dict.fromkeys(indices))
        found = zip(indices, self._pool.map(self._get, indices), strict=True)
        return {index: image for index, image in found if image is not None}

    def _drawn(self, index: int, read: Mapping[int, np.ndarray]) -> np.ndarray:
        if index not in read:
            what = f"this process cannot read it, but another one can ({self.dropped.get(index)})"
            raise DataError(self.entries[index].where, what, "Give all processes the same files")
        return read[index]

    def _agree(self) -> None:
        """Drop what any process could not read."""
        new = {index: text for index, text in self.dropped.items() if index not in self._agreed}
        found = self.processes.union(new)
        self.drop(found)
        self._agreed |= found.keys()

    def _get(self, index: int) -> np.ndarray | None:
        cached = self._cache.get(index)
        return self._read(index) if cached is None else cached

    def _read(self, index: int) -> np.ndarray | None:
        if index in self.dropped:
            return None
        try:
            with self.entries[index].open() as image:
                return prepare_image(image, self.resolution)
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions
            if isinstance(error, DataError) and not isinstance(error, ImageError):
                raise  # a failing disk would drop one image after another
            fault = unreadable_image(self.entries[index].where, error)
            self.dropped[index] = what_and_option(fault)
            self.weights[index] = 0
            return None

    def _nothing_left(self) -> DataError:
        index, reason = next(iter(sorted(self.dropped.items())))
        return DataError(
            self.entries[index].where,
            f"{reason}, and none of the {len(self.entries)} images can be used",
            "Pass images that Pillow can read",
        )


def write_dropped(dropped: Sequence[tuple[str, str]], folder: Path) -> None:
    """List images, each with the reason, in FOLDER/image.dropped.jsonl; without any, no file."""
    path = folder / DROPPED_FILE
    lines = [
        json.dumps({"image": name, "reason": reason}, ensure_ascii=False)
        for name, reason in dropped
    ]
    if lines:
        write_text(path, "\n".join(lines) + "\n")
    else:
        with writing(path):
            path.unlink(missing_ok=True)


def training_batch(images: ImageSet, config: ImageTrainingConfig, seed: int, step: int) -> Tensor:
    """The pixels of one step, on the CPU: float32 [share, 3, H, W] in [-1, 1].

    The share is that of the process, of a batch of ``batch_size``.
    """
    rng = np.random.default_rng([seed, step])
    pixels_BCHW = to_pixels(images.draw(config.batch_size, rng))
    if config.rotate_degrees == config.shift == config.scale == 0:
        return pixels_BCHW
    return augment(pixels_BCHW, config, rng, images.processes)


def augment(
    pixels_BCHW: Tensor,
    config: ImageTrainingConfig,
    rng: np.random.Generator,
    processes: Processes | None = None,
) -> Tensor:
    """Rotate, scale and shift each image a little; uncovered areas repeat the border.

    Args:
        pixels_BCHW: The share of this process.
        config: Has the ranges.
        rng: Draws for the batch of all processes.
        processes: Those that share the batch.
    """
    processes = processes or Processes()
    count = pixels_BCHW.shape[0] * processes.size
    angle = np.deg2rad(rng.uniform(-config.rotate_degrees, config.rotate_degrees, count))
    size = 1 + rng.uniform(-config.scale, config.scale, count)
    shift = 2 * rng.uniform(-config.shift, config.shift, (count, 2))  # the image is 2 wide in torch
    rows = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
    matrix = np.stack(rows, axis=1).reshape(count, 2, 2) / size[:, None, None]
    moves = np.concatenate([matrix, shift[:, :, None]], axis=2)[processes.part(count)]
    theta = torch.tensor(moves, dtype=torch.float32)
    grid = functional.affine_grid(theta, list(pixels_BCHW.shape), align_corners=False)
    return functional.grid_sample(
        pixels_BCHW, grid, padding_mode="border", align_corners=False, mode="bilinear"
    )
