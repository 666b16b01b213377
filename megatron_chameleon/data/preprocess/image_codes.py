"""Turns image parts into image codes; threads read and decode images while the network encodes.

Of chosen images it also finds the digest of the pixels, by which documents are held out.

With a cache folder, the codes of an image are kept under the SHA-256 of its file's bytes. Each
tokenizer has a folder of its own in the cache, and padded and cropped images have separate entries.
A damaged entry is made again.
"""

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.preprocess.layout import ShapedCodes
from megatron_chameleon.data.preprocess.memory_budget import MemoryBudget
from megatron_chameleon.errors import DataError, one_line
from megatron_chameleon.files import read_bytes, write_bytes
from megatron_chameleon.images.pixels import digest_of_pixels
from megatron_chameleon.tokenizer.common.grids import Grid

if TYPE_CHECKING:
    from PIL import Image

    from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer

THREADS = 2
_DIGEST_ENDING = "-digest"
_DIGEST_BYTES = 32
BATCHES_AHEAD = 2
"""Most batches of prepared images that wait for the network; this bounds the memory."""

MOST_WAITING = 256
"""Most prepared images that wait for others of their grid; this bounds the memory too."""


class ImageCache:
    """Codes of images that were encoded before.

    Args:
        folder: Any folder; several processes may share it.
        name: Subfolder for this tokenizer; equal names must mean equal codes.
        grids: Those that an image may have. If they are several, each entry begins with its own.
        codebook_size: Number of image codes.
    """

    def __init__(
        self, folder: str | Path, name: str, grids: Sequence[Grid], codebook_size: int
    ) -> None:
        self.folder = Path(folder) / name
        self.codebook_size = codebook_size
        self._grids = frozenset(grids)
        self._square = grids[0] if len(grids) == 1 else None
        self._most_bytes = 4 * (2 + max(grid.codes for grid in grids))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> ShapedCodes | None:
        """The grid and the codes of an image; None if they are missing or damaged."""
        try:
            content = read_bytes(self._path(key), limit=self._most_bytes)
        except DataError:
            return None
        if len(content) % 4:
            return None
        numbers = np.frombuffer(content, dtype="<u4").astype(np.int64)
        grid, codes = self._square, numbers
        if grid is None:
            if len(numbers) < 2:
                return None
            grid, codes = Grid(int(numbers[0]), int(numbers[1])), numbers[2:]
        if grid not in self._grids or len(codes) != grid.codes:
            return None
        return (grid, codes) if codes.max(initial=0) < self.codebook_size else None

    def get_digest(self, key: str) -> bytes | None:
        """The digest of an image's pixels, 32 bytes; None if it is missing or damaged."""
        try:
            content = read_bytes(self._path(key + _DIGEST_ENDING), limit=_DIGEST_BYTES)
        except DataError:
            return None
        return content if len(content) == _DIGEST_BYTES else None

    def put_digest(self, key: str, digest: bytes) -> None:
        """Store the digest of an image's pixels.

        Raises:
            DataError: It cannot be written.
        """
        self._write(self._path(key + _DIGEST_ENDING), digest)

    def put(self, key: str, image: ShapedCodes) -> None:
        """Store the grid and the codes of an image.

        Raises:
            DataError: If they cannot be written.
        """
        grid, codes = image
        shape = () if self._square else grid
        self._write(
            self._path(key), np.append(np.array(shape, "<u4"), codes).astype("<u4").tobytes()
        )

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_bytes(path, content)
        except DataError as error:
            remedy = "Make room there, or choose another --image-cache"
            raise DataError(f"--image-cache {self.folder}", error.what, remedy) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: codes must not depend on the number of cores, and every core has a
    worker already."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ShapedPixels = tuple[Grid, np.ndarray]
"""A picture: its grid, and its prepared pixels uint8 [height, width, 3]."""


class _Prepared(NamedTuple):
    """An image as the network takes it."""

    key: str
    """In the cache."""
    found: ShapedPixels | ShapedCodes | ImageError
    """Its grid and pixels, or codes if they were in the cache; or its fault."""
    digest: bytes = b""
    """Of its pixels; empty if it was not wanted."""


class ImageEncoder:
    """Encodes images in batches, in the order of the parts.

    Args:
        tokenizer: The image tokenizer, on its device.
        cache: Where codes are kept; None keeps none.
        budget: The memory that it shares with other workers; None if there are none.
    """

    def __init__(
        self,
        tokenizer: "ImageTokenizer",
        cache: ImageCache | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.budget = budget or MemoryBudget()
        self.cache = cache
        self.cached_images = 0
        self.digests: dict[int, bytes] = {}
        """Digests of pixels that the last ``encode`` was asked for, by the image's position."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="images")

    def encode(
        self,
        parts: Sequence[ImagePart],
        padded: Sequence[bool] | None = None,
        digested: Collection[int] = (),
    ) -> list[ShapedCodes | ImageError]:
        """The grid and the codes of each image, int64 [grid.codes], or what is wrong with it.

        Args:
            parts: The images.
            padded: For each image, whether it is padded instead of cropped; None crops all.
            digested: Positions of the images whose digests are wanted; ``digests`` has those of
                the sound ones.

        Raises:
            DataError: If a disk or network fails.
        """
        results: list[ShapedCodes | ImageError] = []
        waiting: dict[Grid, list[tuple[int, str, np.ndarray]]] = {}
        self.digests = {}
        wanted = [position in digested for position in range(len(parts))]
        for key, found, digest in self._prepared(parts, padded or [False] * len(parts), wanted):
            if digest:
                self.digests[len(results)] = digest
            if isinstance(found, tuple) and found[1].ndim == 3:
                grid, pixels = found
                group = waiting.setdefault(grid, [])
                group.append((len(results), key, pixels))
                results.append(found)
                if len(group) == self.tokenizer.batch_size:
                    self._flush(grid, waiting.pop(grid), results)
                elif sum(map(len, waiting.values())) > MOST_WAITING:
                    fullest = max(waiting, key=lambda grid: len(waiting[grid]))
                    self._flush(fullest, waiting.pop(fullest), results)
                continue
            self.cached_images += isinstance(found, tuple)
            results.append(found)
        for grid, group in waiting.items():
            self._flush(grid, group, results)
        return results

    def _flush(
        self,
        grid: Grid,
        group: list[tuple[int, str, np.ndarray]],
        results: list[ShapedCodes | ImageError],
    ) -> None:
        """Encode images of one grid, which replace their pixels in the results."""
        with _one_thread():
            batch = self.tokenizer.encode_prepared(np.stack([pixels for _, _, pixels in group]))
        for (position, key, _), codes in zip(group, batch, strict=True):
            results[position] = (grid, codes)
            if self.cache is not None:
                self.cache.put(key, (grid, codes))

    def _prepared(
        self, parts: Sequence[ImagePart], padded: Sequence[bool], digested: Sequence[bool]
    ) -> "Iterator[_Prepared]":
        """What the threads have made of each image, a few batches ahead."""
        ahead = BATCHES_AHEAD * self.tokenizer.batch_size
        futures: deque[Future[_Prepared]] = deque()
        rest = zip(parts, padded, digested, strict=True)
        try:
            while True:
                while len(futures) < ahead and (item := next(rest, None)) is not None:
                    futures.append(self._pool.submit(self._prepare, *item))
                if not futures:
                    return
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()

    def _prepare(self, part: ImagePart, pad: bool, digested: bool) -> "_Prepared":
        try:
            with self.budget.large_file(part.size_on_disk()):
                data = part.read()
                if self.cache is None:
                    return _Prepared("", *self._pixels(part, data, pad, digested))
                name = hashlib.sha256(data).hexdigest()
                key = name + ("-padded" if pad else "")
                codes = self.cache.get(key)
                digest = (self.cache.get_digest(name) if digested else None) or b""
                if codes is not None and bool(digest) == digested:
                    return _Prepared(key, codes, digest)
                pixels, digest = self._pixels(part, data, pad, digested)
                if digested:
                    self.cache.put_digest(name, digest)
                return _Prepared(key, pixels if codes is None else codes, digest)
        except ImageError as fault:
            return _Prepared("", fault)

    def _pixels(
        self, part: ImagePart, data: bytes, pad: bool, digested: bool
    ) -> tuple[ShapedPixels, bytes]:
        """The grid and pixels of the prepared image, and its digest if it is wanted."""
        with ExitStack() as stack:
            image = part.decode(
                data, lambda image: stack.enter_context(self.budget.reserve(_memory_of(image)))
            )
            try:
                digest = digest_of_pixels(image) if digested else b""
                return self.tokenizer.prepare(image, pad=pad), digest
            except Exception as error:  # Pillow's parsers raise all kinds of exceptions
                what = f"the image cannot be prepared ({one_line(error)})"
                raise ImageError(part.name, what, "Replace or remove it") from error


def _memory_of(image: "Image.Image") -> int:
    """Bytes that an image takes until it is prepared, by its size, mode and format."""
    is_plain = image.mode in ("1", "L", "RGB") and "transparency" not in image.info
    pixel_bytes = 8 if is_plain else 12  # Pillow keeps 4, and copies are made one after the other
    if image.format in ("WEBP", "AVIF"):  # decoded as a whole outside Pillow
        pixel_bytes = 16
    return pixel_bytes * image.width * image.height
