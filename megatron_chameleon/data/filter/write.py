"""Reads the inputs a second time: lines of the documents that are kept, and samples for the page.

A table of one byte per record says what becomes of it. Worker processes make the lines; the
parent writes them in the order of the inputs.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.filter.lines import ImageNamer, ImagePlaces, line_of
from megatron_chameleon.data.filter.measures.measure import Reader, ReadOptions
from megatron_chameleon.data.inputs.records import Block, Fault
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.files import replace_file
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.thumbnails import thumbnail

UNKNOWN, DROPPED, KEPT = 0, 1, 2
SAMPLE = 4
"""Added to what becomes of a record that the page shows."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
THUMBNAIL_SIDE = 160
MOST_THUMBNAILS = 3
EXCERPT_CHARACTERS = 300
_COPY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}\.[a-z0-9]+")


@dataclass
class Sample:
    """A document that the page shows."""

    id: str
    where: str
    text: str
    """The beginning of its texts."""
    thumbnails: list[bytes]
    """Files of its first pictures, made small."""
    images: int


@dataclass
class Written:
    """What the parent needs of a block."""

    lines: list[bytes] = field(default_factory=list)
    """Of the documents that are kept."""
    dropped: list[str] = field(default_factory=list)
    """The ids of documents that a filter drops, in order."""
    samples: list[Sample] = field(default_factory=list)
    """In order."""
    copied: set[str] = field(default_factory=set)
    read_bytes: int = 0


class LineMaker:
    """Makes the lines of blocks; one lives in each worker.

    Args:
        states: For each input, what becomes of each record, by its number.
        read: How documents are read.
        score_key: The key of the score.
        places: Where pictures go; None: no lines are made.
    """

    def __init__(
        self,
        states: list[bytes],
        read: ReadOptions,
        score_key: str | None,
        places: ImagePlaces | None,
    ) -> None:
        self._states = states
        self._reader = Reader(read, score_key)
        self._namer = None if places is None else ImageNamer(places)

    def make(self, block: Block) -> Written:
        """The lines of a block.

        Raises:
            DataError: A picture of a document that is kept cannot be read or copied.
        """
        written = Written(read_bytes=block.after.read_bytes)
        states = self._states[block.input]
        for item in self._reader.read(block):
            if isinstance(item, Fault) or item.record >= len(states):
                continue
            state = states[item.record]
            if state & KEPT and self._namer is not None:
                written.lines.append(self._line(item))
            elif state & DROPPED:
                written.dropped.append(item.id)
            if state & SAMPLE:
                written.samples.append(_sample_of(item))
        if self._namer is not None:
            written.copied = self._namer.copied
            self._namer.copied = set()
        return written

    def _line(self, document: Document) -> bytes:
        assert self._namer is not None
        try:
            return line_of(document, self._reader.values, self._namer.name)
        except ImageError as error:
            remedy = "Leave out --no-check-images, or do not change the inputs while they are read"
            raise DataError(document.where, f"{error.where}: {error.what}", remedy) from error


def make_line_maker(*arguments: Any) -> Any:
    """What a worker process makes lines with (``data/workers/pool.py``)."""
    return LineMaker(*arguments).make


def _sample_of(document: Document) -> Sample:
    pictures = [part for part in document.content if isinstance(part, ImagePart)]
    text = " ".join(
        part.text[: 2 * EXCERPT_CHARACTERS]
        for part in document.content[:1000]
        if isinstance(part, TextPart)
    )
    text = " ".join(text.split())
    if len(text) > EXCERPT_CHARACTERS:
        text = f"{text[:EXCERPT_CHARACTERS]}..."
    thumbnails = [data for part in pictures[:MOST_THUMBNAILS] if (data := _thumbnail(part))]
    return Sample(document.id, document.where, text, thumbnails, len(pictures))


def _thumbnail(part: ImagePart) -> bytes:
    try:
        return thumbnail(part.open(), THUMBNAIL_SIDE)
    except Exception:  # a broken picture, without --check-images
        return b""


# Files


def suffix_of_output(path: str | Path) -> str:
    """The suffix of an output.

    Raises:
        ConfigError: It is none of ``SUFFIXES``.
    """
    name = str(path).rsplit("/", 1)[-1]
    found = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)
    if found is None or name == found:
        what = (
            f"{name!r} must be a name that ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
        raise ConfigError("--output", what, "Write it as kept.jsonl")
    return found


def output_files(path: str | Path, shards: int) -> list[Path]:
    """The files of an output: itself, or NAME-00000-of-00004.jsonl and so on."""
    if shards == 1:
        return [Path(path)]
    suffix = suffix_of_output(path)
    stem = str(path).removesuffix(suffix)
    return [Path(f"{stem}-{i:05d}-of-{shards:05d}{suffix}") for i in range(shards)]


def beside(path: str | Path, ending: str) -> Path:
    """A name beside an output, such as kept.filter.json for kept.jsonl."""
    return Path(str(path).removesuffix(suffix_of_output(path)) + ending)


class LineWriter:
    """Writes lines into the files of an output, which all appear at the end, or none of them.

    Args:
        files: The files.
        lines: Number of lines that will come; each file gets about the same number.
    """

    def __init__(self, files: list[Path], lines: int) -> None:
        self._files = files
        self._lines = lines
        self._written = 0
        self._stack = ExitStack()
        self._streams: list[IO[bytes]] = []

    def __enter__(self) -> "LineWriter":
        try:
            for path in self._files:
                file = self._stack.enter_context(replace_file(path))
                self._streams.append(self._stack.enter_context(_compressed(file, path)))
        except BaseException as error:
            if not self._stack.__exit__(type(error), error, error.__traceback__):
                raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, line: bytes) -> None:
        """Write the next line."""
        number = self._written * len(self._files) // max(self._lines, 1)
        self._streams[number].write(line)
        self._written += 1


@contextlib.contextmanager
def _compressed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    kind = {"gz": "gzip", "zst": "zstd"}.get(path.name.rsplit(".", 1)[-1])
    if kind is None:
        yield file
        return
    import pyarrow

    # pyarrow closes what it writes to, and the file must still be flushed to the disk
    with os.fdopen(os.dup(file.fileno()), "wb") as own:
        sink = pyarrow.PythonFile(own, mode="w")
        with pyarrow.CompressedOutputStream(sink, kind) as stream:
            yield stream


def remove_old_copies(folder: Path, needed: set[str]) -> int:
    """Remove copies that an earlier output needed and this one does not; returns how many.

    Only files that are named like our copies are touched.
    """
    if folder.is_symlink() or not folder.is_dir():
        return 0
    removed = 0
    for path in folder.glob("??/*"):
        name = path.relative_to(folder).as_posix()
        if _COPY.fullmatch(name) and name not in needed and not path.parent.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed
