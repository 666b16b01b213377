"""What a token file is: names, layouts and the sidecar.

``indexed.py`` reads it, ``token_writer.py`` writes it.

    PREFIX.bin        the token ids of all documents, one after the other, uint16 or int32
    PREFIX.idx        Megatron's index: header, length and byte offset of each document
    PREFIX.documents  a ``DOCUMENT_RECORD`` record of 24 bytes for each document
    PREFIX.images     an ``IMAGE_RECORD`` record of 8 bytes for each image
    PREFIX.answers    an ``ANSWER_RECORD`` record of 16 bytes for each answer of a conversation
    PREFIX.json       the sidecar ``TokenFileInfo``: totals, names of sources and inputs, tokenizer

Everything is little endian and memory-mapped: opening a token file reads the sidecar and no more,
whatever the number of documents. The images of document ``d`` are the records
``first_image[d]`` to ``first_image[d + 1]``. PREFIX.answers is there if a document is a
conversation: of such a one only the tokens of its answers are trained, of any other all.
PREFIX.dropped.jsonl is for people: what was left out.

Layout of the .idx: 9 bytes ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 sequences,
uint64 document boundaries, then int32 length and int64 byte offset of each sequence, and int64
document boundaries (the first is 0). Here one sequence is one document.

Source of the .idx: megatron/core/datasets/indexed_dataset.py.
"""

import json
import struct
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chameleon.errors import DataError

FORMAT = "megatron_chameleon.tokens/2"
ANSWERS_FORMAT = "megatron_chameleon.tokens/3"
"""With PREFIX.answers: who does not know it would train prompts too."""
REMEDY = "Write the files with: chameleon preprocess INPUTS --tokenizer DIR --output PREFIX"
REQUIRED_SUFFIXES = (".bin", ".idx", ".documents", ".images")
"""The files that a token file always has, beside the sidecar."""
ANSWERS_SUFFIX = ".answers"
"""The file that it has if it holds conversations."""

IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32"}
IDX_DTYPES[8] = "uint16"
"""Megatron's codes; ours are uint16 and int32."""

DOCUMENT_RECORD = np.dtype(
    [("first_image", "<u8"), ("record", "<u8"), ("input", "<u4"), ("corpus", "<u4")]
)
"""``first_image``: images of all documents before it. ``record``: line, row or sample of the input,
from 1. ``input`` and ``corpus``: positions in the lists of the sidecar."""

TOKEN_SPAN = np.dtype([("start", "<u4"), ("length", "<u4")])
"""Tokens in a row: position in their document, and how many."""

IMAGE_RECORD = TOKEN_SPAN
"""From the begin-image token to the end-image token, both included."""

ANSWER_RECORD = np.dtype([("start", "<u8"), ("length", "<u8")])
"""Tokens of an answer, the ``</s>`` behind it included. ``start`` is counted from the first token
of the file, so that the answers of a document are found by one binary search."""

MOST_CORPORA = 1 << 16


@dataclass
class CorpusTotals:
    """What one source has in a token file."""

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


@dataclass(frozen=True)
class TokenFileInfo:
    """The sidecar PREFIX.json."""

    tokenizer_fingerprint: str
    tokenizer: str
    """Path of the tokenizer folder as it was given, a convenience for ``chameleon inspect``."""
    vocab_size: int
    dtype: str
    """uint16 or int32."""
    documents: int
    tokens: int
    image_tokens: int
    """Image codes and their begin and end tokens."""
    images: int
    bin_bytes: int
    sources: dict[str, CorpusTotals] = field(default_factory=dict)
    """Totals by source; the order is that of the numbers in PREFIX.documents."""
    inputs: list[str] = field(default_factory=list)
    """Files that were read; the order is that of the numbers in PREFIX.documents."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped documents by reason; PREFIX.dropped.jsonl lists them."""
    job: str = ""
    """Digest of inputs, tokenizer and options: the same command need not run again."""
    answers: int = 0
    """Records of PREFIX.answers; 0 where there is no such file."""
    longest_conversation: int = 0
    """In tokens; 0 where there is none."""
    image_fit: str = "crop"
    """How images became square, see ``conversations.IMAGE_FITS``."""
    format: str = FORMAT

    def total(self, name: str) -> int:
        """The sum of a field of ``CorpusTotals`` over all sources."""
        return sum(getattr(totals, name) for totals in self.sources.values())


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive documents as token ids, with what the side files say of them."""

    token_ids: np.ndarray
    """All documents one after the other, [tokens] in the dtype of the file."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]."""
    images: np.ndarray
    """``IMAGE_RECORD`` [images], in the order of the documents."""
    image_counts: np.ndarray
    """Images of each document, int64 [documents]."""
    records: np.ndarray
    """Line, row or sample of each document, int64 [documents]."""
    corpus_names: list[str]
    """In the order in which they first occur."""
    corpus_numbers: np.ndarray
    """Position in ``corpus_names`` of each document, int64 [documents]."""
    input: int = 0
    """Number of the input that they come from."""
    answers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=TOKEN_SPAN))
    """``TOKEN_SPAN`` [answers], in the order of the documents."""
    answer_counts: np.ndarray | None = None
    """Answers of each document, int64 [documents]; None for none."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """uint16 for up to 65,536 ids, the paper's number; megatron-core's rule stops short of it."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def file_of(prefix: str | Path, suffix: str) -> Path:
    """PREFIX with a suffix; a prefix may have dots of its own."""
    path = Path(prefix)
    return path.with_name(path.name + suffix)


def partial_folder(prefix: str | Path) -> Path:
    """Where an unfinished token file grows."""
    return file_of(prefix, ".partial")


def read_info(prefix: str | Path) -> TokenFileInfo:
    """Read the sidecar of a token file.

    Raises:
        DataError: When one of the files is missing, or the sidecar is none.
    """
    missing = [
        suffix for suffix in (".bin", ".idx", ".json") if not file_of(prefix, suffix).is_file()
    ]
    if ".json" in missing and partial_folder(prefix).is_dir():
        remedy = "Finish it with the same `chameleon preprocess` command"
        raise DataError(str(prefix), f"unfinished, {partial_folder(prefix)} is there", remedy)
    if missing == [".json"]:
        raise DataError(
            str(prefix), "the token file is incomplete, its .json (written last) is missing", REMEDY
        )
    if missing:
        raise DataError(str(prefix), f"no token file here, {' and '.join(missing)} missing", REMEDY)
    try:
        record: Any = json.loads(file_of(prefix, ".json").read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(TokenFileInfo)}
        if record["format"] not in (FORMAT, ANSWERS_FORMAT):
            known_formats = f"{FORMAT!r} and {ANSWERS_FORMAT!r}"
            what = f"the format is {record['format']!r}, this version reads {known_formats}"
            raise DataError(f"{prefix}.json", what, REMEDY)
        values = {key: value for key, value in record.items() if key in known}
        values["sources"] = {
            name: CorpusTotals(**totals) for name, totals in record["sources"].items()
        }
        info = TokenFileInfo(**values)
        _check_info(info)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise DataError(
            f"{prefix}.json", f"not the sidecar of a token file ({cause})", REMEDY
        ) from error
    missing = [suffix for suffix in files_of(info) if not file_of(prefix, suffix).is_file()]
    if missing:
        raise DataError(str(prefix), f"{' and '.join(missing)} missing", REMEDY)
    return info


def files_of(info: TokenFileInfo) -> tuple[str, ...]:
    """Suffixes of the files that belong to a token file, beside the sidecar."""
    return (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX) if info.answers else REQUIRED_SUFFIXES


def _check_info(info: TokenFileInfo) -> None:
    """What the reader relies on; the numbers are checked against the files by ``indexed.py``."""
    numbers = ("vocab_size", "documents", "tokens", "image_tokens", "images", "bin_bytes")
    for name in (*numbers, "answers", "longest_conversation"):
        value = getattr(info, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r}")
    if (info.answers > 0) != (info.format == ANSWERS_FORMAT):
        raise ValueError(f"{info.answers} answers in the format {info.format}")
    for name in ("tokenizer_fingerprint", "tokenizer", "dtype", "job", "image_fit"):
        if not isinstance(getattr(info, name), str):
            raise ValueError(f"{name} is {getattr(info, name)!r}")
    if info.dtype not in ("uint16", "int32"):
        raise ValueError(f"dtype is {info.dtype!r}")
    if not isinstance(info.inputs, list) or not all(isinstance(name, str) for name in info.inputs):
        raise ValueError("inputs is no list of names")
    if not all(isinstance(count, int) for count in info.dropped.values()):
        raise ValueError("dropped is no table of numbers")
    if info.bin_bytes != info.tokens * np.dtype(info.dtype).itemsize:
        raise ValueError(f"{info.bin_bytes} bytes for {info.tokens} tokens of {info.dtype}")
