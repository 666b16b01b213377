"""What a token file is: its files, their layouts and the sidecar.

``reader.py`` reads token files, ``writer.py`` writes them.

    PREFIX.bin        the token ids of all documents, one after the other, uint16 or int32
    PREFIX.idx        Megatron's index: header, length and byte offset of each document
    PREFIX.documents  a ``DOCUMENT_RECORD`` of 24 bytes for each document
    PREFIX.images     an ``IMAGE_RECORD`` of 8 bytes for each image, or a ``SHAPED_IMAGE_RECORD`` of
                      12 bytes if the vocabulary has grids
    PREFIX.answers    an ``ANSWER_RECORD`` of 16 bytes for each answer of a conversation
    PREFIX.json       the sidecar ``TokenFileInfo``: totals, names of corpora and inputs, tokenizer

All numbers are little-endian, and the files are memory-mapped: opening a token file reads the
sidecar and nothing else, whatever the number of documents. The images of document ``d`` are the
records ``first_image[d]`` to ``first_image[d + 1]``. PREFIX.answers exists if at least one document
is a conversation. Training uses only the answers of a conversation, but all tokens of any other
document. PREFIX.dropped.jsonl is for people: it lists the documents that were left out.

Layout of the .idx: 9 bytes ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 number of
sequences, uint64 number of document boundaries, then the int32 length and the int64 byte offset of
each sequence, and the int64 document boundaries, of which the first is 0. Here each document is one
sequence.

Source of the .idx: megatron/core/datasets/indexed_dataset.py.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json
from megatron_chameleon.tokenizer.common.grids import Grid, square_grid
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

FORMAT = "megatron_chameleon.tokens/2"
ANSWERS_FORMAT = "megatron_chameleon.tokens/3"
"""With PREFIX.answers. The number tells older readers, which would train on prompts too."""
SHAPED_FORMAT = "megatron_chameleon.tokens/4"
"""With or without PREFIX.answers, of a vocabulary with grids: each image has rows and columns. The
number tells older readers, which would take its records for those of squares."""
REMEDY = "Write the files with: chameleon preprocess INPUTS --tokenizer DIR --output PREFIX"
REQUIRED_SUFFIXES = (".bin", ".idx", ".documents", ".images")
"""The files that every token file has besides its sidecar."""
ANSWERS_SUFFIX = ".answers"
"""The file that it has only if it holds conversations."""

IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32"}
IDX_DTYPES[8] = "uint16"
"""Megatron's codes for types of tokens; we write uint16 and int32."""

DOCUMENT_RECORD = np.dtype(
    [("first_image", "<u8"), ("record", "<u8"), ("input", "<u4"), ("corpus", "<u4")]
)
"""``first_image``: number of images in all earlier documents. ``record``: line, row or sample of
the input, counted from 1. ``input`` and ``corpus``: positions in the sidecar's ``inputs`` and
``sources``."""

TOKEN_SPAN = np.dtype([("start", "<u4"), ("length", "<u4")])
"""Consecutive tokens: the position of the first in its document, and how many they are."""

IMAGE_RECORD = TOKEN_SPAN
"""An image from its begin token to its end token, both included."""

SHAPED_IMAGE_RECORD = np.dtype(
    [("start", "<u4"), ("length", "<u4"), ("rows", "<u2"), ("columns", "<u2")]
)
"""The same with the picture's grid, where pictures have shapes."""


def image_record_of(vocabulary: Vocabulary) -> np.dtype:
    """The records of images in token files of a vocabulary."""
    return SHAPED_IMAGE_RECORD if vocabulary.grids else IMAGE_RECORD


ANSWER_RECORD = np.dtype([("start", "<u8"), ("length", "<u8")])
"""An answer, including the ``</s>`` after it. ``start`` is counted from the file's first token, so
that one binary search finds the answers of a document."""

MOST_CORPORA = 1 << 16
"""Different corpus names that a token file can hold."""
OTHER_CORPORA = "(other sources)"
"""The name that all corpora share which are too many to be told apart."""


@dataclass
class CorpusTotals:
    """What one corpus has in a token file."""

    documents: int = 0
    tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    conversations: int = 0
    """Documents with answers."""
    conversation_tokens: int = 0
    conversation_image_tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    answer_images: int = 0
    answer_image_tokens: int = 0
    pairs: int = 0
    """Documents that are two conversations: a prompt with a chosen and with a rejected answer."""

    def add(self, other: "CorpusTotals") -> None:
        """Add the totals of further documents."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


TRAINING, HELD_OUT = "training", "held out"
"""The two sides of a hold-out."""
HOLDOUT_ENDING = "-holdout"


@dataclass(frozen=True)
class HoldoutInfo:
    """How the documents of an input were divided into a training side and a held-out side.

    Both token files have the same, apart from the side.
    """

    side: str
    """``TRAINING`` or ``HELD_OUT``."""
    share: float
    """Share of the documents that is held out on average, between 0 and 1."""
    hash: str
    """Name of the hash that chooses them; ``preprocess/holdout.py`` explains it."""
    training_documents: int
    training_tokens: int
    held_out_documents: int
    held_out_tokens: int


@dataclass(frozen=True)
class TokenFileInfo:
    """The sidecar PREFIX.json."""

    tokenizer_fingerprint: str
    tokenizer: str
    """Path of the tokenizer folder as it was given; ``chameleon inspect`` looks there."""
    vocab_size: int
    dtype: str
    """uint16 or int32."""
    documents: int
    tokens: int
    image_tokens: int
    """Image codes with their begin and end tokens."""
    images: int
    bin_bytes: int
    sources: dict[str, CorpusTotals] = field(default_factory=dict)
    """Totals by corpus name, in the order of the numbers in PREFIX.documents."""
    inputs: list[str] = field(default_factory=list)
    """Files that were read, in the order of the numbers in PREFIX.documents."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped documents by reason; PREFIX.dropped.jsonl lists them."""
    job: str = ""
    """Digest of inputs, tokenizer and options; tells whether a command has done its work."""
    answers: int = 0
    """Number of records in PREFIX.answers; 0 if there is no such file."""
    longest_conversation: int = 0
    """In tokens; 0 if there is no conversation."""
    image_fit: str = "crop"
    """How images became square: see ``IMAGE_FITS`` in data/documents/conversations.py."""
    format: str = FORMAT
    holdout: HoldoutInfo | None = None
    """Which side of a hold-out it is; None if nothing was held out."""
    longest_image: int = 0
    """Tokens of the longest image of a shaped file; 0 if there is none, or all are squares."""

    @property
    def is_shaped(self) -> bool:
        """Whether its images have grids of several shapes."""
        return self.format == SHAPED_FORMAT

    @property
    def image_record(self) -> np.dtype:
        """The records of PREFIX.images."""
        return SHAPED_IMAGE_RECORD if self.is_shaped else IMAGE_RECORD

    def total(self, name: str) -> int:
        """The sum of a field of ``CorpusTotals`` over all corpora."""
        return sum(getattr(totals, name) for totals in self.sources.values())


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive documents as token ids, with what the side files record about them."""

    token_ids: np.ndarray
    """All documents one after the other, [tokens] in the dtype of the file."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]."""
    images: np.ndarray
    """``IMAGE_RECORD`` or ``SHAPED_IMAGE_RECORD`` [images], in the order of the documents."""
    image_counts: np.ndarray
    """Number of images of each document, int64 [documents]."""
    records: np.ndarray
    """Line, row or sample of each document, int64 [documents]."""
    corpus_names: list[str]
    """In the order in which they first occur."""
    corpus_numbers: np.ndarray
    """Position in ``corpus_names`` of each document, int64 [documents]."""
    input: int = 0
    """Number of the input that the documents come from."""
    answers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=TOKEN_SPAN))
    """``TOKEN_SPAN`` [answers], in the order of the documents."""
    answer_counts: np.ndarray | None = None
    """Number of answers of each document, int64 [documents]; None if there are no answers."""
    pairs: np.ndarray | None = None
    """Which documents are pairs of a chosen and a rejected answer, bool [documents]; None: none."""


def grids_of_images(images: np.ndarray) -> list[Grid]:
    """The grid of each image.

    Args:
        images: ``IMAGE_RECORD`` or ``SHAPED_IMAGE_RECORD`` [images].

    Raises:
        DataError: A record of a square image names no square.
    """
    if images.dtype == SHAPED_IMAGE_RECORD:
        pairs = zip(images["rows"].tolist(), images["columns"].tolist(), strict=True)
        return [Grid(rows, columns) for rows, columns in pairs]
    return [square_grid(length - 2) for length in images["length"].tolist()]


def holdout_prefix(prefix: str | Path) -> str:
    """Where the held-out side of PREFIX is written: PREFIX-holdout."""
    return f"{prefix}{HOLDOUT_ENDING}"


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """uint16 for up to 65,536 ids, the paper's number, for which megatron-core would take int32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def file_of(prefix: str | Path, suffix: str) -> Path:
    """The path PREFIX + suffix, where the prefix may contain dots itself."""
    path = Path(prefix)
    return path.with_name(path.name + suffix)


def partial_folder_of(prefix: str | Path) -> Path:
    """The folder in which an unfinished token file grows."""
    return file_of(prefix, ".partial")


def info_to_json(info: TokenFileInfo) -> str:
    """The text of a sidecar. ``holdout``, ``pairs`` and ``longest_image`` are there only if they
    say something."""
    record = asdict(info)
    for totals in record["sources"].values():
        if not totals["pairs"]:
            del totals["pairs"]
    if info.holdout is None:
        del record["holdout"]
    if not info.is_shaped:
        del record["longest_image"]
    return json.dumps(record, indent=2) + "\n"


def read_info(prefix: str | Path) -> TokenFileInfo:
    """Read the sidecar of a token file.

    Raises:
        DataError: A file is missing, or the .json is not a sidecar of ours.
    """
    missing = [
        suffix for suffix in (".bin", ".idx", ".json") if not file_of(prefix, suffix).is_file()
    ]
    if ".json" in missing and partial_folder_of(prefix).is_dir():
        remedy = "Finish it with the same `chameleon preprocess` command"
        what = f"the token file is unfinished: {partial_folder_of(prefix)} still exists"
        raise DataError(str(prefix), what, remedy)
    is_other = missing == [".json"] and not file_of(prefix, ".documents").exists()
    if is_other or file_of(prefix, ".ds").is_file() or str(prefix).endswith(".ds"):
        what = "it was not written by chameleon preprocess, so its tokenizer is not known"
        raise DataError(
            str(prefix), what, "Name it: --tokenizer DIR, or tokenizer.path in a config"
        )
    if missing == [".json"]:
        raise DataError(
            str(prefix),
            "the token file is incomplete: its .json, which is written last, is missing",
            REMEDY,
        )
    if missing:
        raise DataError(str(prefix), f"no token file here: {_listed(missing)} missing", REMEDY)
    try:
        record: Any = read_json(file_of(prefix, ".json"))
    except DataError as error:
        raise DataError(error.where, error.what, REMEDY) from error
    try:
        known = {entry.name for entry in fields(TokenFileInfo)}
        if record["format"] not in (FORMAT, ANSWERS_FORMAT, SHAPED_FORMAT):
            known_formats = f"{FORMAT!r}, {ANSWERS_FORMAT!r} and {SHAPED_FORMAT!r}"
            what = f"the format is {record['format']!r:.99}, but this version reads {known_formats}"
            raise DataError(f"{prefix}.json", what, REMEDY)
        values = {key: value for key, value in record.items() if key in known}
        values["sources"] = {
            name: CorpusTotals(**totals) for name, totals in record["sources"].items()
        }
        if values.get("holdout") is not None:
            values["holdout"] = HoldoutInfo(**values["holdout"])
        info = TokenFileInfo(**values)
        _check_info(info)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"{prefix}.json", f"not the sidecar of a token file ({cause})", REMEDY
        ) from error
    missing = [suffix for suffix in files_of(info) if not file_of(prefix, suffix).is_file()]
    if missing:
        raise DataError(str(prefix), f"{_listed(missing)} missing", REMEDY)
    return info


def files_of(info: TokenFileInfo) -> tuple[str, ...]:
    """Suffixes of the files that belong to a token file, besides the sidecar."""
    return (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX) if info.answers else REQUIRED_SUFFIXES


def _listed(suffixes: Sequence[str]) -> str:
    """Such as ".bin and .idx are"."""
    return f"{' and '.join(suffixes)} {'is' if len(suffixes) == 1 else 'are'}"


def check_totals(sources: Mapping[str, CorpusTotals]) -> None:
    """Check totals that were read from a file.

    Raises:
        ValueError: A total is not a number of 0 or more.
    """
    for name, totals in sources.items():
        for key, value in vars(totals).items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{key} of the source {name[:60]!r} is {value!r:.99}")


def _check_info(info: TokenFileInfo) -> None:
    """Check what the reader relies on; ``reader.py`` compares the numbers with the files."""
    numbers = ("vocab_size", "documents", "tokens", "image_tokens", "images", "bin_bytes")
    for name in (*numbers, "answers", "longest_conversation", "longest_image"):
        value = getattr(info, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r:.99}")
    if info.documents and not info.tokens:
        raise ValueError(f"{info.documents} documents with 0 tokens")
    check_totals(info.sources)
    if not info.is_shaped and (info.answers > 0) != (info.format == ANSWERS_FORMAT):
        raise ValueError(f"{info.answers} answers in the format {info.format}")
    for name in ("tokenizer_fingerprint", "tokenizer", "dtype", "job", "image_fit"):
        if not isinstance(getattr(info, name), str):
            raise ValueError(f"{name} is {getattr(info, name)!r:.99}")
    if info.dtype not in ("uint16", "int32"):
        raise ValueError(f"dtype is {info.dtype!r:.99}")
    if not isinstance(info.inputs, list) or not all(isinstance(name, str) for name in info.inputs):
        raise ValueError("inputs is not a list of names")
    if not all(type(count) is int for count in info.dropped.values()):
        raise ValueError("dropped is not a table of numbers")
    if info.holdout is not None:
        _check_holdout(info, info.holdout)
    if info.bin_bytes != info.tokens * np.dtype(info.dtype).itemsize:
        raise ValueError(f"{info.bin_bytes} bytes for {info.tokens} tokens of {info.dtype}")


def _check_holdout(info: TokenFileInfo, holdout: HoldoutInfo) -> None:
    numbers = {
        TRAINING: (holdout.training_documents, holdout.training_tokens),
        HELD_OUT: (holdout.held_out_documents, holdout.held_out_tokens),
    }
    if holdout.side not in numbers or not isinstance(holdout.hash, str):
        raise ValueError(f"holdout is {vars(holdout)!r:.99}")
    if type(holdout.share) is not float or not 0 < holdout.share < 1:
        raise ValueError(f"holdout.share is {holdout.share!r:.99}")
    if any(type(n) is not int or n < 0 for side in numbers.values() for n in side):
        raise ValueError(f"holdout is {vars(holdout)!r:.99}")
    if numbers[holdout.side] != (info.documents, info.tokens):
        what = f"holdout names {numbers[holdout.side]} documents and tokens on this side"
        raise ValueError(f"{what}, but there are {(info.documents, info.tokens)}")
