"""Measures the documents of a block: one row of numbers per document, in arrays.

What a filter decides is computed from these numbers by ``judge.py``. So memory grows by some
hundred bytes per document, and by 1.7 KB with ``near_duplicates``, however long the documents are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chameleon.data.documents.conversations import fault_of
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import UnusedKeys, parse_block
from megatron_chameleon.data.documents.records import Origin, document_of
from megatron_chameleon.data.documents.schema import SYSTEM, Document, TextPart
from megatron_chameleon.data.filter.measures.blocklist import Blocklist
from megatron_chameleon.data.filter.measures.options import SCORE_KEYS, FilterOptions
from megatron_chameleon.data.filter.measures.pictures import Picture, PictureMeasurer
from megatron_chameleon.data.filter.measures.texts import (
    PERMUTATIONS,
    LanguageDetector,
    MinHasher,
    asked,
    count_words,
    document_hash,
)
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    Block,
    Fault,
    Limits,
    too_long_text,
)
from megatron_chameleon.errors import DataError, what_and_option
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions

KINDS: Mapping[str, Any] = {
    "input": np.int32,
    "record": np.int64,
    "images": np.int32,
    "characters": np.int64,
    "words": np.int64,
    "tokens": np.int64,
    "language": np.int16,
    "probability": np.float32,
    "blocked": np.int32,
    "score": np.float64,
    "min_width": np.int32,
    "max_width": np.int32,
    "min_height": np.int32,
    "max_height": np.int32,
    "aspect_ratio": np.float32,
    "factor": np.float32,
    "distance": np.float32,
    "hash": np.uint64,
    "asked_hash": np.uint64,
    "group": np.uint64,
    "asked_group": np.uint64,
}
"""The columns with one number per document, and their types."""


@dataclass(frozen=True)
class Unreadable:
    """A document that cannot be read, as ``chameleon preprocess`` would say it."""

    where: str
    id: str
    reason: str
    detail: str


@dataclass
class Measured:
    """The documents of a block that can be read."""

    columns: dict[str, np.ndarray]
    """[documents] each, as in ``KINDS``; those that no filter needs are missing."""
    pixels: np.ndarray
    """Hash of the pixels of each picture, uint64 [pictures]."""
    phashes: np.ndarray
    """Perceptual hash of each picture, uint64 [pictures]."""
    has_phash: np.ndarray
    """bool [pictures]"""
    signatures: np.ndarray | None
    """MinHash signatures, uint32 [documents, permutations]; zeros for documents without words."""
    asked_signatures: np.ndarray | None
    """Those of the first question of each conversation."""
    unreadable: list[Unreadable] = field(default_factory=list)
    unused_keys: frozenset[str] = frozenset()
    read_bytes: int = 0
    """Of the inputs, up to the end of the block."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read, the first time and the second."""

    images: ImageOptions = field(default_factory=ImageOptions)
    limits: Limits = field(default_factory=Limits)
    ignored_keys: tuple[str, ...] = ()


class Reader:
    """Reads the documents of blocks, and the score that stands beside each of them.

    Args:
        read: How to read.
        key: The key of the score; None for one of ``SCORE_KEYS``.
    """

    def __init__(self, read: ReadOptions, key: str | None) -> None:
        self._read = read
        self._key = key
        self.values: dict[str, Any] = {}
        """Of the document that was read last: values that are kept beside it."""
        self.score = math.nan

    def read(self, block: Block) -> Any:
        """Documents, and a ``Fault`` in the place of each that cannot be read."""
        ignored = frozenset(self._read.ignored_keys)
        for item in parse_block(block, self._make, ignored, self._read.images):
            yield item if isinstance(item, Fault) else self._checked(item)

    def _make(
        self, record: Mapping[str, Any], origin: Origin, own: Mapping[str, bytes] | None = None
    ) -> Document:
        self.values = {"weight": record["weight"]} if record.get("weight") is not None else {}
        self.score = math.nan
        found = find_score(record, self._key)
        if found is not None:
            self.values[found[0]], self.score = found[1], number_of(found[1])
        return document_of(record, origin, own)

    def _checked(self, document: Document) -> Document | Fault:
        texts = [part.text for part in document.content if isinstance(part, TextPart)]
        limit = self._read.limits.text_bytes
        size = sum(map(len, texts))
        if size > limit >> 2:  # a character has at most four bytes
            size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > limit:
            fault = too_long_text(document.where, size, limit)
        elif what := fault_of(document):
            error = DataError(document.where, what, "Correct or remove it")
            fault = Fault(error, BROKEN_DOCUMENT)
        else:
            return document
        return Fault(fault.error, fault.reason, document.id, document.corpus_name)


def find_score(record: Mapping[str, Any], key: str | None) -> tuple[str, Any] | None:
    """The top-level key of the score of a record, and the value; None if it has none."""
    if key is not None:
        value: Any = record.get(key)
        if value is None:
            value = record
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        return None if value is None else (key, value)
    names = {str(name).lower(): name for name in record}
    name = next((names[name] for name in SCORE_KEYS if name in names), None)
    return None if name is None or record[name] is None else (str(name), record[name])


def number_of(value: Any) -> float:
    """A score as a number, of several the lowest; NaN if it is none."""
    if isinstance(value, list | tuple):
        return min(map(number_of, value), key=lambda n: (n == n, n), default=math.nan)
    if isinstance(value, bool):
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


class Measurer:
    """Measures documents; one lives in each worker.

    Args:
        options: The filters.
        read: How documents are read.

    Raises:
        ConfigError: A package, list, scorer or tokenizer is missing.
    """

    def __init__(self, options: FilterOptions, read: ReadOptions) -> None:
        self.options = options
        self.blocklist = Blocklist.read(
            options.blocklists, options.blocklist_parts_of_words, options.blocklist_case
        )
        self.reader = Reader(read, options.score_key)
        needs_phash = options.near_images is not None
        self._opens = options.opens_images or self.blocklist.has_pictures
        self._pictures = PictureMeasurer(
            options.needs_pixels, needs_phash, options.scorer, self.blocklist
        )
        self._hasher = MinHasher() if options.near_duplicates is not None else None
        self.languages = LanguageDetector(options.languages) if options.languages else None
        self._text: Any = None
        if options.counts_tokens:
            # PyTorch comes with it, which takes seconds in each worker
            from megatron_chameleon.tokenizer.folder import load_tokenizer

            self._text = load_tokenizer(Path(str(options.tokenizer)), images=False).text

    def measure(self, block: Block) -> Measured:
        """Measure the documents of a block.

        Raises:
            DataError: A disk or network fails, or a filter cannot decide.
        """
        unused, rows = UnusedKeys(), _Rows(self._hasher is not None, bool(self.options.against))
        for item in unused.watch(self.reader.read(block)):
            if isinstance(item, Fault):
                detail = what_and_option(item.error)
                rows.unreadable.append(Unreadable(item.error.where, item.id, item.reason, detail))
                continue
            try:
                pictures = self._measure_pictures(item)
            except ImageError as error:
                detail = f"{error.where}: {what_and_option(error)}"
                rows.unreadable.append(Unreadable(item.where, item.id, error.reason, detail))
                continue
            self._add(rows, item, pictures, block.input)
        return rows.measured(frozenset(unused.names), block.after.read_bytes)

    def _measure_pictures(self, document: Document) -> list[Picture]:
        parts = [part for part in document.content if isinstance(part, ImagePart)]
        if not self._opens:
            return [Picture(0, 0) for _ in parts]
        return [self._pictures.measure(part) for part in parts]

    def _add(self, rows: "_Rows", document: Document, pictures: list[Picture], number: int) -> None:
        options = self.options
        texts = [part.text for part in _own_texts(document)]
        row: dict[str, Any] = {"input": number, "record": document.record, "images": len(pictures)}
        row["characters"] = sum(map(len, texts))
        if options.min_words is not None or options.max_words is not None:
            row["words"] = count_words(texts)
        if self._text is not None:
            row["tokens"] = sum(map(len, self._text.encode_batch(texts)))
        if self.languages is not None:
            row["language"], row["probability"] = self.languages.detect(texts)
        if self.blocklist.entries:
            row["blocked"] = self._blocked(document, texts, pictures)
        row["score"] = self._score(pictures)
        row.update(self._sizes(pictures))
        pixels = [picture.pixels for picture in pictures]
        if options.needs_pixels:
            row["hash"] = document_hash(document.content, pixels)
            row["group"] = document_hash([None] * len(pixels), pixels) if pixels else 0
        first, stop = asked(document)
        if options.against:
            parts = document.content[first:stop]
            before = sum(isinstance(part, ImagePart) for part in document.content[:first])
            count = sum(isinstance(part, ImagePart) for part in parts)
            own = pixels[before : before + count]
            row["asked_hash"] = document_hash(parts, own)
            row["asked_group"] = document_hash([None] * count, own) if own else 0
        rows.add(row, pictures)
        if self._hasher is not None:
            rows.signatures.append(self._hasher.signature(texts))
            if options.against:
                asking = [p.text for p in document.content[first:stop] if isinstance(p, TextPart)]
                same = first == 0 and stop == len(document.content)
                found = rows.signatures[-1] if same else self._hasher.signature(asking)
                rows.asked_signatures.append(found)

    def _blocked(self, document: Document, texts: list[str], pictures: list[Picture]) -> int:
        found = [picture.blocked for picture in pictures if picture.blocked >= 0]
        in_text = self.blocklist.in_text(" ".join(texts), document.where)
        return min([*found, in_text] if in_text >= 0 else found, default=-1)

    def _score(self, pictures: list[Picture]) -> float:
        if self.options.scorer is None:
            return self.reader.score
        return number_of([picture.score for picture in pictures])

    def _sizes(self, pictures: list[Picture]) -> dict[str, float]:
        if not pictures or not self._opens:
            return {}
        widths, heights = [p.width for p in pictures], [p.height for p in pictures]
        found: dict[str, float] = {
            "min_width": min(widths),
            "max_width": max(widths),
            "min_height": min(heights),
            "max_height": max(heights),
            "aspect_ratio": max(max(p.width / p.height, p.height / p.width) for p in pictures),
        }
        if (nearest := self.options.nearest_size) is not None:
            logs = [
                (abs(math.log(p.width / nearest[0])), abs(math.log(p.height / nearest[1])))
                for p in pictures
            ]
            found["factor"] = math.exp(max(map(max, logs)))
            found["distance"] = max(math.hypot(*both) for both in logs)
        return found


def _own_texts(document: Document) -> list[TextPart]:
    """The texts that the document itself has, without the empty line after a system message."""
    roles = document.roles or ("",) * len(document.content)
    pairs = list(zip(document.content, roles, strict=True))
    return [
        part
        for place, (part, role) in enumerate(pairs)
        if isinstance(part, TextPart)
        and not (role == SYSTEM and (place + 1 == len(pairs) or pairs[place + 1][1] != SYSTEM))
    ]


class _Rows:
    """Rows of a block while they are measured."""

    def __init__(self, has_signatures: bool, has_asked: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[Picture] = []
        self.signatures: list[np.ndarray | None] = []
        self.asked_signatures: list[np.ndarray | None] = []
        self.unreadable: list[Unreadable] = []
        self._has_signatures = has_signatures
        self._has_asked = has_asked

    def add(self, row: dict[str, Any], pictures: list[Picture]) -> None:
        self.rows.append(row)
        self.pictures += pictures

    def measured(self, unused: frozenset[str], read_bytes: int) -> Measured:
        names = {name for row in self.rows for name in row}
        columns = {
            name: np.array([row.get(name, _missing(kind)) for row in self.rows], dtype=kind)
            for name, kind in KINDS.items()
            if name in names
        }
        phashes = [picture.phash for picture in self.pictures]
        return Measured(
            columns,
            np.array([picture.pixels for picture in self.pictures], dtype=np.uint64),
            np.array([value or 0 for value in phashes], dtype=np.uint64),
            np.array([value is not None for value in phashes], dtype=bool),
            _stacked(self.signatures) if self._has_signatures else None,
            _stacked(self.asked_signatures) if self._has_signatures and self._has_asked else None,
            self.unreadable,
            unused,
            read_bytes,
        )


def _missing(kind: Any) -> float:
    return math.nan if np.dtype(kind).kind == "f" else 0


def _stacked(signatures: list[np.ndarray | None]) -> np.ndarray:
    empty = np.zeros(PERMUTATIONS, dtype=np.uint32)
    rows = [empty if row is None else row for row in signatures]
    return np.stack(rows) if rows else np.zeros((0, PERMUTATIONS), dtype=np.uint32)


def make_measurer(options: FilterOptions, read: ReadOptions) -> Any:
    """What a worker process measures blocks with (``data/workers/pool.py``)."""
    return Measurer(options, read).measure
