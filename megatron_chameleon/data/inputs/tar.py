"""Reads WebDataset tars: the files that share a key are one sample.

The key is a file's path up to the first dot of its name; the rest is the suffix. A tar is read as a
stream, so it may be compressed or remote. What archivers add of their own is passed over: links,
folders, ``._name`` and ``__MACOSX/`` of macOS, ``PaxHeaders`` folders, and names that begin with a
dot.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from megatron_chameleon.data.inputs.decoding.broken_file import BrokenFile
from megatron_chameleon.data.inputs.decoding.compression import decompressed
from megatron_chameleon.data.inputs.decoding.tar_entries import Entry, Reader, read_entries
from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.data.inputs.records import (
    BLOCK_IMAGES,
    BROKEN_DOCUMENT,
    BROKEN_FILE,
    Fault,
    FileBlock,
    TarSamples,
    fault_of_rest,
    tell,
    too_large,
)
from megatron_chameleon.errors import DataError

BLOCK_SAMPLES = BLOCK_IMAGES
BLOCK_BYTES = 16 << 20
_REMEDY = "Copy or write the tar again"
_FOREIGN_FOLDERS = ("__MACOSX", "PaxHeaders")


class _Stream:
    """A reader of the chunks of a decompressed file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        if size <= len(self._rest):
            data, self._rest = self._rest[:size], self._rest[size:]
            return bytes(data)
        parts = [self._rest]
        have = len(self._rest)
        self._rest = memoryview(b"")
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(memoryview(chunk)[: size - have])
            self._rest = memoryview(chunk)[size - have :]
            have += len(parts[-1])
        return b"".join(parts)


@dataclass
class _Sample:
    """The files of one key; their contents are let go when they are too large together."""

    key: str
    files: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    problem: str = ""

    def add(self, suffix: str, entry: Entry, limit: int) -> None:
        self.size += entry.size
        self.problem = self.problem or (f"{entry.name}: {entry.problem}" if entry.problem else "")
        if self.size > limit or entry.content is None:
            self.files.clear()
        else:
            self.files[suffix] = entry.content


def tar_blocks(item: InputFile, file: IO[bytes], done: int, limit: int) -> Iterator[FileBlock]:
    """Blocks of the samples that follow the first ``done`` ones.

    A sample is a dict of suffixes to bytes, plus ``__key__``. If a suffix occurs twice, the last
    file is kept. A sample that cannot be used, or a damaged place, is a ``Fault`` and counts as
    one sample.

    Args:
        item: The file.
        file: The open file.
        done: Samples that an earlier run has read.
        limit: Most bytes of a sample.
    """
    stream: Reader = (
        file if item.compression is None else _Stream(decompressed(file, item.compression))
    )
    count, size = 0, 0
    waiting: list[dict[str, Any]] = []
    broken = None
    samples = _samples(item, stream, limit)
    while True:
        try:
            found = next(samples, None)
        except BrokenFile as error:
            found, broken = None, error
        is_sample = isinstance(found, _Sample)
        if waiting and (not is_sample or len(waiting) == BLOCK_SAMPLES or size > BLOCK_BYTES):
            before = count - len(waiting)
            yield FileBlock(TarSamples(waiting), before, count, count, tell(file, item))
            size, waiting = 0, []
        if found is None:
            break
        count += 1
        if count <= done:
            continue
        if isinstance(found, Fault):
            yield FileBlock(found, count - 1, count, count, tell(file, item))
        else:
            waiting.append({**found.files, "__key__": found.key})
            size += found.size
    if broken is not None:
        fault = fault_of_rest(broken, item.path, f"after sample {count}")
        yield FileBlock.last(fault, count, item.size_bytes)


def _samples(item: InputFile, stream: Reader, limit: int) -> Iterator[_Sample | Fault]:
    """The samples in order, and a fault in the place of each that cannot be used."""
    sample: _Sample | None = None
    count = 0
    try:
        for entry in _entries(stream, limit):
            key, suffix = _key_and_suffix(entry.name)
            if sample is not None and key != sample.key:
                yield _finished(item, sample, limit)
                sample, count = None, count + 1
            if not entry.name:
                what = f"{entry.problem} after sample {count}; reading goes on at the next one"
                yield Fault(DataError(item.path, what, _REMEDY), BROKEN_FILE)
                count += 1
                continue
            sample = sample or _Sample(key)
            sample.add(suffix, entry, limit)
    except BrokenFile:
        if sample is not None and not sample.problem:
            yield _finished(item, sample, limit)
        raise
    if sample is not None:
        yield _finished(item, sample, limit)


def _finished(item: InputFile, sample: _Sample, limit: int) -> _Sample | Fault:
    where = f"{item.path}:{sample.key}"
    if sample.size > limit:
        what = f"the files of the sample have {sample.size >> 20} MiB"
        return too_large(where, what, limit, sample.key)
    if sample.problem:
        return Fault(DataError(where, sample.problem, _REMEDY), BROKEN_DOCUMENT, sample.key)
    return sample


def _entries(stream: Reader, limit: int) -> Iterator[Entry]:
    """The files that may belong to samples, and the damaged places."""
    for entry in read_entries(stream, limit):
        name = entry.name.removeprefix("./")
        folders, _, base = name.rpartition("/")
        is_foreign = base.startswith(".") or "." not in base
        if entry.name and (is_foreign or _is_foreign_folder(folders)):
            continue
        yield replace(entry, name=name)


def _is_foreign_folder(path: str) -> bool:
    return bool(path) and any(name.startswith(_FOREIGN_FOLDERS) for name in path.split("/"))


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()
