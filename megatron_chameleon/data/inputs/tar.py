"""Reads WebDataset tars: the files that share a key are one sample.

The key is a file's path up to the first dot of its name; the rest is the suffix. A tar is read as a
stream, so it may be compressed or remote.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.data.inputs.records import (
    BLOCK_IMAGES,
    BROKEN_FILE,
    BrokenFile,
    Fault,
    FileBlock,
    TarSamples,
    decompressed,
    tell,
)
from megatron_chameleon.errors import DataError

BLOCK_SAMPLES = BLOCK_IMAGES
BLOCK_BYTES = 16 << 20
LARGEST_FILE_BYTES = 128 << 20
"""Bytes of one file in a tar; a larger file is neither an image nor a caption."""


class _Stream:
    """Gives ``tarfile`` the ``read`` method that it needs, over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


def tar_blocks(item: InputFile, file: IO[bytes], done: int) -> Iterator[FileBlock]:
    """Blocks of the samples that follow the first ``done`` ones.

    A sample is a dict of suffixes to bytes, plus ``__key__``. If a suffix occurs twice, the last
    file is kept.
    """
    stream = file if item.compression is None else _Stream(decompressed(item, file))
    count, size, waiting = 0, 0, []
    broken: BrokenFile | None = None
    samples = _samples(stream)
    while True:
        try:
            sample = next(samples, None)
        except BrokenFile as cause:
            sample, broken = None, cause
        if sample is not None:
            count += 1
            if count > done:
                waiting.append(sample)
                size += sum(len(value) for value in sample.values())
        if waiting and (sample is None or len(waiting) == BLOCK_SAMPLES or size > BLOCK_BYTES):
            before = count - len(waiting)
            yield FileBlock(TarSamples(waiting), before, count, count, tell(file, item))
            size, waiting = 0, []
        if sample is None:
            break
    if broken is not None:
        what = f"the tar is damaged after sample {count}, the rest of it is lost ({broken})"
        error = DataError(item.path, what, "Copy or write the tar again")
        yield FileBlock(Fault(error, BROKEN_FILE), count, count, count, item.size_bytes)


def _samples(stream: Any) -> Iterator[dict[str, Any]]:
    sample: dict[str, Any] = {}
    for name, content in _files(stream):
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        sample["__key__"] = key
        sample[suffix.lower()] = content
    if sample:
        yield sample


def _files(stream: Any) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file; the content of a file that is too large is cut off."""
    try:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
            for member in tar:
                if member.isfile():
                    opened = tar.extractfile(member)
                    assert opened is not None
                    content = opened.read(LARGEST_FILE_BYTES)
                    if len(content) < min(member.size, LARGEST_FILE_BYTES):
                        raise BrokenFile("unexpected end of data")
                    yield member.name, content
                vars(tar)["members"] = []  # otherwise tarfile keeps every member
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise BrokenFile(" ".join(str(error).split())) from error
