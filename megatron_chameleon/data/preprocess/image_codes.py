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
from megatron_chameleon.data.preprocess.memory_budget import MemoryBudget
from megatron_chameleon.errors import DataError, one_line
from megatron_chameleon.files import read_bytes, write_bytes
from megatron_chameleon.images.pixels import digest_of_pixels

if TYPE_CHECKING:
    from PIL import Image

    from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer

THREADS = 2
_DIGEST_ENDING = "-digest"
_DIGEST_BYTES = 32
BATCHES_AHEAD = 2
"""Most batches of prepared images that wait for the network; this bounds the memory."""


class ImageCache:
    """Codes of images that were encoded before.

    Args:
        folder: Any folder; several processes may share it.
        name: Subfolder for this tokenizer; equal names must mean equal codes.
        shape: Codes per image, and size of the codebook.
    """

    def __init__(self, folder: str | Path, name: str, shape: tuple[int, int]) -> None:
        self.folder = Path(folder) / name
        self.codes_per_image, self.codebook_size = shape

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> np.ndarray | None:
        """The codes of an image, int64 [codes_per_image]; None if they are missing or damaged."""
        size = 4 * self.codes_per_image
        try:
            content = read_bytes(self._path(key), limit=size)
        except DataError:
            return None
        if len(content) != size:
            return None
        codes = np.frombuffer(content, dtype="<u4").astype(np.int64)
        return codes if codes.max(initial=0) < self.codebook_size else None

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

    def put(self, key: str, codes: np.ndarray) -> None:
        """Store the codes of an image.

        Raises:
            DataError: If they cannot be written.
        """
        self._write(self._path(key), codes.astype("<u4").tobytes())

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


class _Prepared(NamedTuple):
    """An image as the network takes it."""

    key: str
    """In the cache."""
    found: np.ndarray | ImageError
    """Its pixels, its codes if they were in the cache, or its fault."""
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
    ) -> list[np.ndarray | ImageError]:
        """The codes of each image, int64 [codes_per_image], or what is wrong with it.

        Args:
            parts: The images.
            padded: For each image, whether it is padded to a square; None crops all.
            digested: Positions of the images whose digests are wanted; ``digests`` has those of
                the sound ones.

        Raises:
            DataError: If a disk or network fails.
        """
        results: list[np.ndarray | ImageError] = []
        waiting: list[tuple[int, str, np.ndarray]] = []
        self.digests = {}
        wanted = [position in digested for position in range(len(parts))]
        for key, found, digest in self._prepared(parts, padded or [False] * len(parts), wanted):
            if digest:
                self.digests[len(results)] = digest
            if isinstance(found, np.ndarray) and found.ndim == 3:
                waiting.append((len(results), key, found))
            elif isinstance(found, np.ndarray):
                self.cached_images += 1
            results.append(found)
            if len(waiting) == self.tokenizer.batch_size:
                self._flush(waiting, results)
        self._flush(waiting, results)
        return results

    def _flush(
        self, waiting: list[tuple[int, str, np.ndarray]], results: list[np.ndarray | ImageError]
    ) -> None:
        if not waiting:
            return
        with _one_thread():
            batch = self.tokenizer.encode_prepared(np.stack([pixels for _, _, pixels in waiting]))
        for (position, key, _), codes in zip(waiting, batch, strict=True):
            results[position] = codes
            if self.cache is not None:
                self.cache.put(key, codes)
        waiting.clear()

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
    ) -> tuple[np.ndarray, bytes]:
        """The prepared image, uint8 [resolution, resolution, 3], and its digest if it is wanted."""
        from megatron_chameleon.tokenizer.image.tokenizer import prepare_image

        with ExitStack() as stack:
            image = part.decode(
                data, lambda image: stack.enter_context(self.budget.reserve(_memory_of(image)))
            )
            try:
                digest = digest_of_pixels(image) if digested else b""
                return prepare_image(image, self.tokenizer.resolution, pad=pad), digest
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
