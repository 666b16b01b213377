"""Reads token files: PREFIX.bin and PREFIX.idx as Megatron's, with the side files beside them.

    file = open_token_file(PREFIX, tokenizer)   # checks that it is whole and fits the tokenizer
    file.read(document, start, length)          # token ids
    file.lengths                                # tokens of each document, memory-mapped
    file.image_spans(document)                  # where its images are: IMAGE_RECORD [images]
    file.answer_spans(document)                 # where its answers are, if it is a conversation
    file.origin(document)                       # its corpus, and the file and line it came from

``format.py`` describes the layouts. Opening takes the same time and memory for ten documents and
for 10^9: nothing is scanned, and the checks look at the sizes and at both ends. A damaged number in
the middle is found when its document is read, or by ``TokenFile.verify``, which looks at them all.

megatron-core reads the .bin and .idx. The checks in front of it are ours, because it asserts on
broken files, or reads beyond their end.
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
    IMAGE_RECORD,
    TokenBlock,
    TokenFileInfo,
    grids_of_images,
    read_info,
    token_dtype,
)
from megatron_chameleon.data.token_files.index_file import CHUNK_DOCUMENTS, check_index
from megatron_chameleon.data.token_files.plain_files import PlainTokens, is_plain, open_plain
from megatron_chameleon.data.token_files.writer import TokenFileWriter
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.folder import Tokenizer

# megatron-core warns at import, several times, that Transformer Engine is missing
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

_REMEDY = "Copy the file again or run chameleon preprocess again"


@dataclass(frozen=True)
class Origin:
    """Where a document came from."""

    corpus_name: str
    """Name of the corpus."""
    input: str
    """The file; empty if it is not known."""
    record: int
    """Line, row or sample in it, from 1."""


def _keep_maps(dataset: IndexedDataset) -> IndexedDataset:
    """Leave it to the arrays over a dataset's files how long these stay in memory.

    megatron-core unmaps the files when the dataset is collected. An array that was read from it and
    is still in use would then end the process with a segmentation fault. Without the references
    that it unmaps by, the map goes with the last array over it.
    """
    dataset.bin_reader._bin_buffer_mmap = None
    del dataset.index.bin_buffer_mmap
    return dataset


class TokenFile:
    """A complete token file, memory-mapped. ``open_token_file`` makes it."""

    def __init__(self, prefix: str, info: TokenFileInfo, plain: PlainTokens | None = None) -> None:
        self.prefix = prefix
        self.info = info
        self.note = "" if plain is None else plain.note
        """What the user should know about it, in a line; empty for a file of ours."""
        self._plain = plain
        self._corpus_names = list(info.sources)
        self._itemsize = np.dtype(info.dtype).itemsize
        self.documents: np.ndarray
        """``DOCUMENT_RECORD`` [documents], memory-mapped."""
        self.images: np.ndarray = np.empty(0, dtype=IMAGE_RECORD)
        """``info.image_record`` [images], memory-mapped."""
        self.answers: np.ndarray = np.empty(0, dtype=ANSWER_RECORD)
        """``ANSWER_RECORD`` [answers], memory-mapped."""
        if plain is not None:
            self.documents, self.images = plain.documents, plain.images
            return
        self._dataset = _keep_maps(IndexedDataset(prefix))
        self.documents = np.memmap(f"{prefix}.documents", dtype=DOCUMENT_RECORD, mode="r")
        if info.images:  # an empty file cannot be memory-mapped
            self.images = np.memmap(f"{prefix}.images", dtype=info.image_record, mode="r")
        if info.answers:
            self.answers = np.memmap(f"{prefix}{ANSWERS_SUFFIX}", dtype=ANSWER_RECORD, mode="r")

    def __len__(self) -> int:
        return self.info.documents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents], memory-mapped."""
        if self._plain is not None:
            return self._plain.lengths
        return self._dataset.index.sequence_lengths

    @property
    def offsets(self) -> np.ndarray:
        """First byte of each document in the .bin, int64 [documents], memory-mapped."""
        if self._plain is not None:
            return self._plain.offsets
        return self._dataset.index.sequence_pointers

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Read one document or a part of it.

        Args:
            document: Its position in the file.
            start: First token.
            length: Number of tokens; None reads to the end.

        Returns:
            Its token ids, [length] in the dtype of the file, read-only.

        Raises:
            DataError: The index names bytes that the .bin does not have, or the .bin names tokens
                that the vocabulary does not have.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        tokens, offset = int(self.lengths[document]), int(self.offsets[document])
        if tokens < 0 or offset < 0 or offset + tokens * self._itemsize > self.info.bin_bytes:
            what = f"document {document} has {tokens} tokens from byte {offset} on, but the .bin "
            what += f"ends at byte {self.info.bin_bytes}"
            raise DataError(f"{self.prefix}.idx", what, _REMEDY)
        available = tokens - start
        length = available if length is None else length
        # megatron-core would read on into the next document
        assert start >= 0 and 0 <= length <= available, f"tokens {start}+{length} of {tokens}"
        file = self._dataset if self._plain is None else self._plain
        token_ids = file.get(document, start, length)
        if length and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.info.vocab_size:
            what = f"document {document} has token ids from {token_ids.min()} to {token_ids.max()}"
            what += f", but the vocabulary ends at {self.info.vocab_size - 1}"
            raise DataError(f"{self.prefix}.bin", what, _REMEDY)
        return token_ids

    def image_spans(self, document: int) -> np.ndarray:
        """Find the images of a document.

        Returns:
            ``info.image_record`` [images], a view of ``images``.

        Raises:
            DataError: PREFIX.documents names images that do not exist.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        first = int(self.documents["first_image"][document])
        last = self.info.images
        if document + 1 < len(self):
            last = int(self.documents["first_image"][document + 1])
        if not first <= last <= self.info.images:
            what = f"document {document} has the images {first} to {last} of {self.info.images}"
            raise DataError(f"{self.prefix}.documents", what, _REMEDY)
        return self.images[first:last]

    def image_grids(self, document: int) -> list[Grid]:
        """Rows and columns of the codes of each image of a document.

        Raises:
            DataError: As ``image_spans``, or an image of a file without shapes is no square.
        """
        return grids_of_images(self.image_spans(document))

    def image_counts(self, first: int, stop: int) -> np.ndarray:
        """Count the images of the documents ``first`` to ``stop`` - 1.

        Returns:
            int64 [stop - first]; negative where PREFIX.documents is damaged.
        """
        borders = self.documents["first_image"][first : stop + 1].astype(np.int64)
        if stop == len(self):
            borders = np.append(borders, self.info.images)
        return np.diff(borders)

    def answer_spans(self, document: int) -> np.ndarray:
        """Find the answers of a conversation.

        Returns:
            int64 [answers, 2], each with its position in the document and its number of tokens.
            A document that is not a conversation has none.

        Raises:
            DataError: PREFIX.answers names tokens beyond the end of the document.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        begin = int(self.offsets[document]) // self._itemsize
        tokens = int(self.lengths[document])
        found = self._answers_between(begin, begin + tokens)
        starts, lengths = (found[name].astype(np.int64) for name in ("start", "length"))
        starts -= begin
        if ((starts < 0) | (lengths < 1) | (lengths > tokens - starts)).any():
            what = f"document {document} has {tokens} tokens and ends before its answer does"
            raise DataError(f"{self.prefix}{ANSWERS_SUFFIX}", what, _REMEDY)
        return np.stack([starts, lengths], axis=1)

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        """Which of the documents ``first`` to ``stop`` - 1 have answers: bool [stop - first]."""
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
        """The corpus of a document, and the file and line that it came from.

        Raises:
            DataError: PREFIX.documents names a corpus or an input that the sidecar does not list.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        record = self.documents[document]
        corpus, number = int(record["corpus"]), int(record["input"])
        if corpus >= len(self._corpus_names) or number >= max(len(self.info.inputs), 1):
            what = f"document {document} names source {corpus} and input {number}, but the .json "
            what += f"lists {len(self._corpus_names)} and {len(self.info.inputs)}"
            raise DataError(f"{self.prefix}.documents", what, _REMEDY)
        name = self.info.inputs[number] if self.info.inputs else ""
        return Origin(self._corpus_names[corpus], name, int(record["record"]))

    def verify(self) -> None:
        """Check every number of the .idx and the side files, in constant memory.

        Raises:
            DataError: A number does not fit; the error names the first such document.
        """
        if self._plain is not None:
            return  # all of it was read when it was opened
        offset = 0
        for start in range(0, len(self), CHUNK_DOCUMENTS):
            chunk = slice(start, start + CHUNK_DOCUMENTS)
            lengths = self.lengths[chunk].astype(np.int64)
            ends = offset + np.cumsum(lengths) * self._itemsize
            expected = ends - lengths * self._itemsize
            wrong = (lengths <= 0) | (self.offsets[chunk] != expected)
            _refuse(f"{self.prefix}.idx", wrong, start, "has a length or offset that does not fit")
            offset = int(ends[-1])
            self._verify_images(start, lengths)
            self._verify_answers(start, lengths, int(expected[0]) // self._itemsize)
        if self.info.answers and self.answers["start"][-1] >= self.info.tokens:
            what = f"its last answer begins after the {self.info.tokens} tokens of all documents"
            raise DataError(f"{self.prefix}{ANSWERS_SUFFIX}", what, _REMEDY)
        if offset != self.info.bin_bytes:
            what = f"names {offset} bytes of tokens, but the .bin has {self.info.bin_bytes}"
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
        if self.info.is_shaped:
            rows, columns = (images[name].astype(np.int64) for name in ("rows", "columns"))
            wrong |= images["length"] != rows * (columns + 1) + 3
        document = np.repeat(np.arange(count), counts)
        _refuse(f"{self.prefix}.images", wrong, start, "ends before its image does", document)

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
    """Report the first wrong entry, whose document is ``start`` plus its own or ``document``'s
    number."""
    if wrong.any():
        first = int(np.argmax(wrong))
        first = start + (first if document is None else int(document[first]))
        raise DataError(path, f"document {first} {what}", _REMEDY)


def open_token_file(prefix: str | Path, tokenizer: Tokenizer | None) -> TokenFile:
    """Open a token file after checking that it is complete and belongs to the tokenizer.

    Args:
        prefix: Path of the files without .bin and .idx.
        tokenizer: The tokenizer that must have written the file; None skips that check. A file of
            another program (``plain_files.py``) is read with it and cannot do without.

    Raises:
        DataError: A file is missing, broken, truncated or empty, or another tokenizer wrote it.
    """
    if tokenizer is not None and is_plain(prefix):
        plain = open_plain(prefix, tokenizer)
        return TokenFile(str(prefix), plain.info, plain)
    info = read_info(prefix)
    _check_tokenizer(str(prefix), info, tokenizer)
    check_index(f"{prefix}.idx", info)
    _check_sizes(str(prefix), info)
    return TokenFile(str(prefix), info)


def _check_tokenizer(prefix: str, info: TokenFileInfo, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    remedy = "Name the tokenizer that it was written with, or run chameleon preprocess again"
    if info.vocab_size != tokenizer.vocabulary.size:
        what = f"written for a vocabulary of {info.vocab_size} ids, but {tokenizer.folder} has "
        raise DataError(prefix, f"{what}{tokenizer.vocabulary.size}", remedy)
    if info.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"written with a tokenizer of fingerprint {info.tokenizer_fingerprint[:12]}, but "
        what += f"that of {tokenizer.folder} is {tokenizer.fingerprint[:12]}"
        raise DataError(prefix, what, remedy)


def _check_sizes(prefix: str, info: TokenFileInfo) -> None:
    """Compare the size of each file with the numbers in the sidecar."""
    contents = [
        (".bin", info.tokens, np.dtype(info.dtype).itemsize, "tokens"),
        (".documents", info.documents, DOCUMENT_RECORD.itemsize, "documents"),
        (".images", info.images, info.image_record.itemsize, "images"),
    ]
    if info.answers:
        contents.append((ANSWERS_SUFFIX, info.answers, ANSWER_RECORD.itemsize, "answers"))
    for suffix, count, itemsize, noun in contents:
        found = Path(f"{prefix}{suffix}").stat().st_size
        if found != count * itemsize:
            what = f"has {found} bytes; its .json names {count} {noun}, which take "
            what += f"{count * itemsize}"
            raise DataError(f"{prefix}{suffix}", what, _REMEDY)
