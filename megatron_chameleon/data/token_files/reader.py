"""Reading token files: PREFIX.bin and PREFIX.idx as Megatron's, with the side files beside them.

    file = open_token_file(PREFIX, tokenizer)   # checks that it is whole and the tokenizer's
    file.read(document, start, length)          # token ids
    file.lengths                                # tokens of each document, memory-mapped
    file.image_spans(document)                  # where its images are: IMAGE_RECORD [images]
    file.answer_spans(document)                 # where its answers are, if it is a conversation
    file.origin(document)                       # its source, and the file and line it came from

``token_format.py`` has the layouts. Opening takes the same time and memory for ten documents and
for 10^9: nothing is scanned, the checks are of sizes and of the two ends. A damaged number in the
middle shows when its document is read, or at once with ``TokenFile.verify``.

megatron-core reads the two files; the checks in front of it are ours, because it asserts on broken
files, or reads beyond their end.
"""

import bisect
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_chameleon.data.token_files.format import (
    ANSWER_RECORD,
    ANSWERS_SUFFIX,
    DOCUMENT_RECORD,
    IDX_DTYPES,
    IDX_HEADER,
    IDX_MAGIC,
    IMAGE_RECORD,
    TokenBlock,
    TokenFileInfo,
    read_info,
    token_dtype,
)
from megatron_chameleon.data.token_files.writer import TokenFileWriter
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer

# megatron-core warns at import, several times, that Transformer Engine is not there
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

__all__ = [
    "DOCUMENT_RECORD",
    "IMAGE_RECORD",
    "Origin",
    "TokenBlock",
    "TokenFile",
    "TokenFileInfo",
    "TokenFileWriter",
    "open_token_file",
    "read_info",
    "token_dtype",
]

_CHUNK_DOCUMENTS = 1 << 20
_REMEDY = "Copy the file again or run chameleon preprocess again"


@dataclass(frozen=True)
class Origin:
    """Where a document came from."""

    corpus_name: str
    """Name of its corpus."""
    input: str
    """The file; empty where it is not known."""
    record: int
    """Line, row or sample in it, from 1."""


class TokenFile:
    """A whole token file, memory-mapped. Made by ``open_token_file``."""

    def __init__(self, prefix: str, info: TokenFileInfo) -> None:
        self.prefix = prefix
        self.info = info
        self._dataset = IndexedDataset(prefix)
        self._corpus_names = list(info.sources)
        self._itemsize = np.dtype(info.dtype).itemsize
        self.documents: np.ndarray = np.memmap(
            f"{prefix}.documents", dtype=DOCUMENT_RECORD, mode="r"
        )
        """``DOCUMENT_RECORD`` [documents], memory-mapped."""
        self.images: np.ndarray = np.empty(0, dtype=IMAGE_RECORD)
        """``IMAGE_RECORD`` [images], memory-mapped."""
        if info.images:  # an empty file cannot be mapped
            self.images = np.memmap(f"{prefix}.images", dtype=IMAGE_RECORD, mode="r")
        self.answers: np.ndarray = np.empty(0, dtype=ANSWER_RECORD)
        """``ANSWER_RECORD`` [answers], memory-mapped."""
        if info.answers:
            self.answers = np.memmap(f"{prefix}{ANSWERS_SUFFIX}", dtype=ANSWER_RECORD, mode="r")

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents], memory-mapped."""
        return self._dataset.index.sequence_lengths

    @property
    def offsets(self) -> np.ndarray:
        """First byte of each document in the .bin, int64 [documents], memory-mapped."""
        return self._dataset.index.sequence_pointers

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of one document or of a part of it, [length] in the dtype of the file,
        read-only.

        Args:
            document: Its position in the file.
            start: First token.
            length: Number of tokens; None reads to the end.

        Raises:
            DataError: When the index names bytes that are not there.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        tokens, offset = int(self.lengths[document]), int(self.offsets[document])
        if tokens < 0 or offset < 0 or offset + tokens * self._itemsize > self.info.bin_bytes:
            what = f"{tokens} tokens from byte {offset} on, the .bin has {self.info.bin_bytes}"
            raise DataError(f"{self.prefix}.idx", f"document {document} has {what}", _REMEDY)
        available = tokens - start
        length = available if length is None else length
        # megatron-core would go on into the next document
        assert start >= 0 and 0 <= length <= available, f"tokens {start}+{length} of {tokens}"
        return self._dataset.get(document, start, length)

    def image_spans(self, document: int) -> np.ndarray:
        """Where the images of a document are: ``IMAGE_RECORD`` [images], a view.

        Raises:
            DataError: When PREFIX.documents names images that are not there.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        first = int(self.documents["first_image"][document])
        last = self.info.images
        if document + 1 < len(self):
            last = int(self.documents["first_image"][document + 1])
        if not first <= last <= self.info.images:
            what = f"document {document} has images {first} to {last} of {self.info.images}"
            raise DataError(f"{self.prefix}.documents", what, _REMEDY)
        return self.images[first:last]

    def image_counts(self, first: int, stop: int) -> np.ndarray:
        """How many images each of these documents has, int64 [stop - first]; negative where
        PREFIX.documents is damaged."""
        borders = self.documents["first_image"][first : stop + 1].astype(np.int64)
        if stop == len(self):
            borders = np.append(borders, self.info.images)
        return np.diff(borders)

    def answer_spans(self, document: int) -> np.ndarray:
        """Where the answers of a conversation are: int64 [answers, 2], position in the document and
        number of tokens; of any other document there are none.

        Raises:
            DataError: When PREFIX.answers names tokens that are not there.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        begin = int(self.offsets[document]) // self._itemsize
        tokens = int(self.lengths[document])
        found = self._answers_between(begin, begin + tokens)
        starts, lengths = (found[name].astype(np.int64) for name in ("start", "length"))
        starts -= begin
        if ((starts < 0) | (lengths < 1) | (lengths > tokens - starts)).any():
            what = f"document {document} has {tokens} tokens, and ends before its answer"
            raise DataError(f"{self.prefix}{ANSWERS_SUFFIX}", what, _REMEDY)
        return np.stack([starts, lengths], axis=1)

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        """Which of these documents have answers: bool [stop - first]."""
        flags = np.zeros(stop - first, dtype=bool)
        if self.info.answers and first < stop:
            begins = self.offsets[first:stop] // self._itemsize
            end = int(begins[-1]) + int(self.lengths[stop - 1])
            starts = self._answers_between(int(begins[0]), end)["start"].astype(np.int64)
            flags[np.searchsorted(begins, starts, side="right") - 1] = True
        return flags

    def _answers_between(self, begin: int, end: int) -> np.ndarray:
        """The answers that start in the tokens [begin, end) of the file."""
        starts = self.answers["start"]
        first = bisect.bisect_left(starts, begin)
        return self.answers[first : bisect.bisect_left(starts, end, lo=first)]

    def origin(self, document: int) -> Origin:
        """The source of a document, and the file and line that it came from.

        Raises:
            DataError: When PREFIX.documents names a source or an input that is not there.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        record = self.documents[document]
        source, number = int(record["corpus"]), int(record["input"])
        if source >= len(self._corpus_names) or number >= max(len(self.info.inputs), 1):
            what = f"document {document} names source {source} and input {number}"
            what += f", the .json has {len(self._corpus_names)} and {len(self.info.inputs)}"
            raise DataError(f"{self.prefix}.documents", what, _REMEDY)
        name = self.info.inputs[number] if self.info.inputs else ""
        return Origin(self._corpus_names[source], name, int(record["record"]))

    def verify(self) -> None:
        """Look at every number of the .idx and the side files, in constant memory.

        Raises:
            DataError: The first document that does not fit.
        """
        offset = 0
        for start in range(0, len(self), _CHUNK_DOCUMENTS):
            chunk = slice(start, start + _CHUNK_DOCUMENTS)
            lengths = self.lengths[chunk].astype(np.int64)
            ends = offset + np.cumsum(lengths) * self._itemsize
            expected = ends - lengths * self._itemsize
            wrong = (lengths <= 0) | (self.offsets[chunk] != expected)
            _refuse(f"{self.prefix}.idx", wrong, start, "has a length or offset that does not fit")
            offset = int(ends[-1])
            self._verify_images(start, lengths)
            self._verify_answers(start, lengths, int(expected[0]) // self._itemsize)
        if self.info.answers and self.answers["start"][-1] >= self.info.tokens:
            what = f"its last answer begins behind the {self.info.tokens} tokens of all documents"
            raise DataError(f"{self.prefix}{ANSWERS_SUFFIX}", what, _REMEDY)
        if offset != self.info.bin_bytes:
            what = f"names {offset} bytes of tokens, the .bin has {self.info.bin_bytes}"
            raise DataError(f"{self.prefix}.idx", what, _REMEDY)

    def _verify_images(self, start: int, lengths: np.ndarray) -> None:
        count = len(lengths)
        records = self.documents[start : start + count]
        following = self.documents["first_image"][start + 1 : start + count + 1].astype(np.int64)
        firsts = records["first_image"].astype(np.int64)
        borders = np.append(firsts, self.info.images)
        borders[1 : len(following) + 1] = following
        counts = np.diff(borders)
        wrong = (counts < 0) | (borders[1:] > self.info.images)
        wrong |= records["corpus"] >= len(self._corpus_names)
        wrong |= records["input"] >= max(len(self.info.inputs), 1)
        wrong[0] |= start == 0 and firsts[0] != 0
        what = "has images, a source or an input that do not fit"
        _refuse(f"{self.prefix}.documents", wrong, start, what)
        images = self.images[borders[0] : borders[-1]]
        room = np.repeat(lengths, counts)
        wrong = images["start"].astype(np.int64) + images["length"] > room
        document = np.repeat(np.arange(count), counts)
        _refuse(f"{self.prefix}.images", wrong, start, "ends before its image", document)

    def _verify_answers(self, start: int, lengths: np.ndarray, begin: int) -> None:
        ends = begin + np.cumsum(lengths)
        answers = self._answers_between(begin, int(ends[-1]))
        starts, sizes = (answers[name].astype(np.int64) for name in ("start", "length"))
        document = np.searchsorted(ends, starts, side="right")
        wrong = (sizes > ends[np.minimum(document, len(ends) - 1)] - starts) | (sizes < 1)
        wrong[1:] |= np.diff(starts) < sizes[:-1]
        _refuse(
            f"{self.prefix}{ANSWERS_SUFFIX}", wrong, start, "has answers that do not fit", document
        )


def _refuse(
    path: str, wrong: np.ndarray, start: int, what: str, document: np.ndarray | None = None
) -> None:
    if wrong.any():
        first = int(np.argmax(wrong))
        first = start + (first if document is None else int(document[first]))
        raise DataError(path, f"document {first} {what}", _REMEDY)


def open_token_file(prefix: str | Path, tokenizer: Tokenizer | None) -> TokenFile:
    """Open a token file after checking that it is whole and belongs to the tokenizer.

    Args:
        prefix: Path of the files without .bin and .idx.
        tokenizer: The tokenizer that must have written them; None skips that check.

    Raises:
        DataError: When a file is missing, broken, truncated or empty, or the tokenizer is another
            one.
    """
    info = read_info(prefix)
    _check_tokenizer(str(prefix), info, tokenizer)
    _check_index(f"{prefix}.idx", info)
    expected = {
        ".bin": info.tokens * np.dtype(info.dtype).itemsize,
        ".documents": info.documents * DOCUMENT_RECORD.itemsize,
        ".images": info.images * IMAGE_RECORD.itemsize,
    }
    if info.answers:
        expected[ANSWERS_SUFFIX] = info.answers * ANSWER_RECORD.itemsize
    for suffix, size in expected.items():
        found = Path(f"{prefix}{suffix}").stat().st_size
        if found != size:
            content = {".bin": f"{info.tokens} tokens", ".images": f"{info.images} images"}
            content[ANSWERS_SUFFIX] = f"{info.answers} answers"
            named = content.get(suffix, f"{info.documents} documents")
            what = f"{found} bytes, its .json names {named}, {size} bytes"
            raise DataError(f"{prefix}{suffix}", what, _REMEDY)
    return TokenFile(str(prefix), info)


def _check_tokenizer(prefix: str, info: TokenFileInfo, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    remedy = "Name the tokenizer it was written with, or run chameleon preprocess again"
    if info.vocab_size != tokenizer.vocabulary.size:
        ours = f"{tokenizer.folder} has {tokenizer.vocabulary.size}"
        raise DataError(
            prefix, f"written for a vocabulary of {info.vocab_size} ids, {ours}", remedy
        )
    if info.tokenizer_fingerprint != tokenizer.fingerprint:
        theirs = f"written with a tokenizer of fingerprint {info.tokenizer_fingerprint[:12]}"
        ours = f"{tokenizer.folder} has {tokenizer.fingerprint[:12]}"
        raise DataError(prefix, f"{theirs}, {ours}", remedy)


def _check_index(path: str, info: TokenFileInfo) -> None:
    """Check the header, the size and both ends of an .idx against the sidecar."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(IDX_HEADER.size)
        if len(head) < IDX_HEADER.size:
            raise DataError(
                path, f"{size} bytes, shorter than the header of {IDX_HEADER.size}", _REMEDY
            )
        magic, version, code, sequences, boundaries = IDX_HEADER.unpack(head)
        if magic != IDX_MAGIC or version != 1:
            what = f"starts with {head[:17]!r}, not with the header of a Megatron .idx, version 1"
            raise DataError(path, what, _REMEDY)
        if IDX_DTYPES.get(code) != info.dtype:
            found = IDX_DTYPES.get(code, f"unknown code {code}")
            raise DataError(path, f"holds {found} tokens, its .json says {info.dtype}", _REMEDY)
        expected = IDX_HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            what = f"{size} bytes, its header names {sequences} documents, {expected} bytes"
            raise DataError(path, what, _REMEDY)
        if sequences != info.documents or boundaries != sequences + 1:
            what = f"holds {sequences} documents, its .json says {info.documents}"
            raise DataError(path, what, _REMEDY)
        if sequences == 0:
            raise DataError(
                path, "holds 0 documents", "Run chameleon preprocess on inputs that have some"
            )
        file.seek(IDX_HEADER.size + 4 * (sequences - 1))
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(IDX_HEADER.size + 12 * sequences - 8)
        offset, first = np.frombuffer(file.read(16), dtype="<i8")
        file.seek(size - 8)
        last = int.from_bytes(file.read(8), "little", signed=True)
    end = int(offset) + length * np.dtype(info.dtype).itemsize
    if end != info.bin_bytes or first != 0 or last != sequences:
        what = f"its last document ends at byte {end}, its .json says {info.bin_bytes}"
        raise DataError(path, what, _REMEDY)
