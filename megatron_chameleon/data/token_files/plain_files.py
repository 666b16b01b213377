"""Token files of other programs: tokens and where documents end, without our files beside them.

    PREFIX.bin, PREFIX.idx        Megatron's, of megatron-core, NeMo or datatrove
    PREFIX.ds, PREFIX.ds.index    datatrove's own: tokens of 2 or 4 bytes, and the uint64 number of
                                  tokens up to the end of each document

Nothing says which tokenizer wrote them, so the caller names it. Images are found by the tokens that
begin and end them, and all documents are read once for that when such a file is opened. It then
takes 44 bytes of memory for each document and 8 for each image.

Documents are taken as they stand. Megatron's have no ``<s>``, and sequences that Megatron splits a
document into are one document again. Where they came from is not known, and none is a conversation.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_chameleon.announce import announced
from megatron_chameleon.data.token_files.format import (
    DOCUMENT_RECORD,
    FORMAT,
    IDX_DTYPES,
    IDX_HEADER,
    IDX_MAGIC,
    IMAGE_RECORD,
    SHAPED_FORMAT,
    CorpusTotals,
    TokenFileInfo,
    file_of,
    image_record_of,
    partial_folder_of,
)
from megatron_chameleon.data.token_files.shaped_images import find_shaped_images
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.files import IMAGE_CONFIG_FILE, tokenizer_file
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer, codes_of_picture
from megatron_chameleon.wording import counted

CHUNK_TOKENS = 1 << 22
"""Tokens that are read at a time, or one document if it is longer."""
SHOWN = 5
"""Documents that an error names."""
_COPY = "Copy the file again, or write it again"


@dataclass(frozen=True)
class PlainTokens:
    """The tokens of a token file of another program, and what a scan of them found."""

    info: TokenFileInfo
    tokens: np.ndarray
    """All token ids, memory-mapped."""
    ends: np.ndarray
    """Tokens up to the end of each document, int64 [documents]."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]."""
    offsets: np.ndarray
    """First byte of each document, int64 [documents]."""
    documents: np.ndarray
    """``DOCUMENT_RECORD`` [documents]."""
    images: np.ndarray
    """``IMAGE_RECORD`` [images]."""
    note: str
    """What the user should know about it, in a line."""

    def get(self, document: int, start: int, length: int) -> np.ndarray:
        """Token ids of a part of a document, in the type of the file."""
        first = int(self.ends[document]) - int(self.lengths[document]) + start
        return np.asarray(self.tokens[first : first + length])


def is_plain(prefix: str | Path) -> bool:
    """Whether a token file of another program has this prefix."""
    if any(file_of(prefix, suffix).exists() for suffix in (".json", ".documents")):
        return False
    if partial_folder_of(prefix).exists():
        return False
    megatron = all(file_of(prefix, suffix).is_file() for suffix in (".bin", ".idx"))
    return megatron or _datatrove_file(prefix) is not None


def open_plain(prefix: str | Path, tokenizer: Tokenizer) -> PlainTokens:
    """Open a token file of another program, and read it once.

    Args:
        prefix: Path of its files.
        tokenizer: The one that wrote it.

    Raises:
        DataError: The files contradict each other, hold ids that the tokenizer does not have, or
            images that are not whole.
    """
    ds = _datatrove_file(prefix)
    path = ds if ds is not None else file_of(prefix, ".bin")
    dtype, ends = _datatrove_index(ds) if ds is not None else _megatron_index(prefix)
    size, count = path.stat().st_size, int(ends[-1])
    if size != count * dtype.itemsize:
        what = f"has {size:,} bytes, but its index names {count:,} tokens of {dtype.itemsize} bytes"
        raise DataError(str(path), what, _COPY)
    tokens: np.ndarray = np.memmap(path, dtype=dtype, mode="r")
    lengths = np.diff(ends, prepend=0)
    with announced(f"reading {path}, which has no list of its images"):
        counts, images = _scan(str(path), tokens, ends, tokenizer)
    documents = np.zeros(len(ends), dtype=DOCUMENT_RECORD)
    documents["first_image"] = np.cumsum(counts) - counts
    documents["record"] = np.arange(1, len(ends) + 1)
    image_tokens = int(images["length"].sum())
    totals = CorpusTotals(len(ends), len(tokens), len(images), image_tokens)
    info = TokenFileInfo(
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer=str(tokenizer.folder),
        vocab_size=tokenizer.vocabulary.size,
        dtype=dtype.name,
        documents=len(ends),
        tokens=len(tokens),
        image_tokens=image_tokens,
        images=len(images),
        bin_bytes=len(tokens) * dtype.itemsize,
        sources={Path(prefix).name: totals},
        format=SHAPED_FORMAT if tokenizer.vocabulary.grids else FORMAT,
        longest_image=int(images["length"].max(initial=0)) if tokenizer.vocabulary.grids else 0,
    )
    note = _note(str(path), tokens, ends, lengths, tokenizer.vocabulary)
    offsets = (ends - lengths) * dtype.itemsize
    return PlainTokens(
        info, tokens, ends, lengths.astype(np.int32), offsets, documents, images, note
    )


def _datatrove_file(prefix: str | Path) -> Path | None:
    """The tokens in datatrove's own form, whose prefix may be given with its ending."""
    for path in (file_of(prefix, ".ds"), Path(prefix)):
        if path.suffix == ".ds" and path.is_file() and file_of(path, ".index").is_file():
            return path
    return None


def _datatrove_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the tokens, and tokens up to the end of each document, int64."""
    index = file_of(path, ".index")
    ends = _ascending(np.fromfile(index, dtype="<u8").astype(np.int64), index)
    size = path.stat().st_size
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if size == ends[-1] * dtype.itemsize:
            return dtype, ends
    what = f"has {size:,} bytes, but its .index names {int(ends[-1]):,} tokens, of 2 or 4 bytes"
    raise DataError(str(path), what, _COPY)


def _megatron_index(prefix: str | Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the tokens, and tokens up to the end of each document, int64."""
    path = file_of(prefix, ".idx")
    content = path.read_bytes()
    try:
        magic, version, code, sequences, boundaries = IDX_HEADER.unpack_from(content)
    except struct.error:
        magic, version, code, sequences, boundaries = b"", 0, 0, 0, 0
    if magic != IDX_MAGIC or version != 1:
        what = f"starts with {content[:17]!r}, not with the header of a Megatron .idx of version 1"
        raise DataError(str(path), what, _COPY)
    dtype = np.dtype(IDX_DTYPES.get(code, "float64"))
    if dtype.kind not in "iu":
        name = IDX_DTYPES.get(code, f"unknown code {code}")
        remedy = "Write token ids as uint16 or int32"
        raise DataError(str(path), f"holds {name} values, which are no token ids", remedy)
    # multimodal files of Megatron have a byte for each sequence behind
    expected = IDX_HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) not in (expected, expected + sequences):
        what = f"has {len(content):,} bytes; its header names {sequences:,} sequences and "
        what += f"{boundaries:,} borders of documents, which take {expected:,}"
        raise DataError(str(path), what, _COPY)
    lengths = np.frombuffer(content, "<i4", sequences, IDX_HEADER.size).astype(np.int64)
    begin = IDX_HEADER.size + 4 * sequences
    pointers = np.frombuffer(content, "<i8", sequences, begin)
    borders = np.frombuffer(content, "<i8", boundaries, begin + 8 * sequences)
    ends = np.cumsum(lengths)
    wrong = (lengths < 0) | (pointers != (ends - lengths) * dtype.itemsize)
    if wrong.any():
        what = f"the position of sequence {int(np.argmax(wrong))} does not follow from the lengths"
        raise DataError(str(path), what, _COPY)
    if boundaries == 0 or borders[0] != 0 or borders[-1] != sequences:
        what = f"the borders of its documents do not span its {sequences:,} sequences"
        raise DataError(str(path), what, _COPY)
    if (np.diff(borders) < 0).any():
        raise DataError(str(path), "the borders of its documents are not in order", _COPY)
    return dtype, _ascending(np.append(0, ends)[borders[1:]], path)


def _ascending(ends: np.ndarray, path: Path) -> np.ndarray:
    """Ends of documents, without those that hold nothing."""
    steps = np.diff(ends, prepend=0)
    if (steps < 0).any():
        what = f"document {int(np.argmax(steps < 0))} ends before it begins"
        raise DataError(str(path), what, _COPY)
    ends = ends[steps > 0]
    if not len(ends):
        raise DataError(str(path), "holds no document with a token", "Write it from some text")
    return ends


def _scan(
    path: str, tokens: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Check the ids, and find the images: their number by document, and ``IMAGE_RECORD``."""
    codes = _codes_per_image(tokenizer)
    shaped = bool(tokenizer.vocabulary.grids)
    counts = np.zeros(len(ends), dtype=np.int64)
    found = [np.empty(0, dtype=image_record_of(tokenizer.vocabulary))]
    foreign, broken = [], []
    for first, stop in _chunks(ends):
        begin = int(ends[first - 1]) if first else 0
        ids = np.asarray(tokens[begin : int(ends[stop - 1])]).astype(np.int64)
        borders = ends[first:stop] - begin
        outside = (ids < 0) | (ids >= tokenizer.vocabulary.size)
        if outside.any():
            foreign += (first + _documents_of(borders, np.flatnonzero(outside))).tolist()
            continue
        if shaped:
            records, bad = find_shaped_images(ids, borders, tokenizer.vocabulary)
        else:
            records, bad, codes = _find_images(ids, borders, tokenizer.vocabulary, codes)
        broken += (first + bad).tolist()
        document = np.searchsorted(borders, records["start"], side="right")
        counts[first:stop] = np.bincount(document, minlength=stop - first)
        records["start"] -= np.append(0, borders)[document].astype(np.uint32)
        found.append(records)
    if foreign:
        what = f"{_named(foreign)} token ids outside the vocabulary of {tokenizer.folder}, whose "
        what += f"{tokenizer.vocabulary.size:,} ids end at {tokenizer.vocabulary.size - 1:,}"
        raise DataError(path, what, "Name the tokenizer that wrote the file")
    if broken:
        content = "its grid, rows of codes" if shaped else f"{codes} codes"
        what = f"{_named(broken)} images that are not whole: a begin of image, {content} and "
        what += "an end of image must follow each other, and no code may stand anywhere else"
        raise DataError(path, what, "Write these documents again, or leave them out")
    return counts, np.concatenate(found)


def _chunks(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    first = 0
    while first < len(ends):
        limit = (int(ends[first - 1]) if first else 0) + CHUNK_TOKENS
        stop = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        yield first, stop
        first = stop


def _find_images(
    ids: np.ndarray, borders: np.ndarray, vocabulary: Vocabulary, codes: int | None
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """The whole images, the documents that hold others, and the codes of an image.

    Args:
        ids: int64 [tokens], of whole documents.
        borders: Tokens up to the end of each of them.
        vocabulary: Of the tokens.
        codes: Codes of an image; None: as many as the first one has.

    Returns:
        ``IMAGE_RECORD`` [images], which count from the first of ``ids``; documents; codes.
    """
    begins = np.flatnonzero(ids == vocabulary.begin_image)
    stops = np.flatnonzero(ids == vocabulary.end_image)
    is_code = vocabulary.is_image_code(ids)
    if codes is None and len(begins):
        behind = stops[stops > begins[0]]
        codes = int(behind[0] - begins[0]) - 1 if len(behind) else 1
    size = codes or 0
    before = np.append(0, np.cumsum(is_code))
    room = borders[np.searchsorted(borders, begins, side="right")] if len(begins) else begins
    whole = begins + size + 2 <= room
    last = np.minimum(begins + size + 1, len(ids) - 1)
    whole &= ids[last] == vocabulary.end_image
    whole &= before[last] - before[np.minimum(begins + 1, len(ids))] == size
    # every code and every end that is not part of a whole image is a stray one
    inside = np.zeros(len(ids) + 1, dtype=np.int64)
    np.add.at(inside, begins[whole], 1)
    np.add.at(inside, begins[whole] + size + 2, -1)
    stray = (is_code | (ids == vocabulary.end_image)) & (np.cumsum(inside[:-1]) == 0)
    wrong = np.concatenate([begins[~whole], np.flatnonzero(stray)])
    records = np.empty(int(whole.sum()), dtype=IMAGE_RECORD)
    records["start"], records["length"] = begins[whole], size + 2
    return records, _documents_of(borders, wrong), codes


def _documents_of(borders: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The documents in which tokens lie, each once."""
    return np.unique(np.searchsorted(borders, places, side="right"))


def _named(documents: list[int]) -> str:
    """Such as "2 documents (3, 17) have"."""
    shown = ", ".join(map(str, documents[:SHOWN]))
    more = ", ..." if len(documents) > SHOWN else ""
    verb = "has" if len(documents) == 1 else "have"
    return f"{counted(len(documents), 'document')} ({shown}{more}, counted from 0) {verb}"


def _codes_per_image(tokenizer: Tokenizer) -> int | None:
    """How many codes an image has; None if the tokenizer cannot read images."""
    path = tokenizer_file(tokenizer.folder, IMAGE_CONFIG_FILE)
    if not path.is_file():
        return None
    try:
        return codes_of_picture(tokenizer.folder)
    except DataError:
        return None


def _note(
    path: str, tokens: np.ndarray, ends: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> str:
    begun = int((tokens[ends - lengths] == vocabulary.bos).sum())
    ended = int((tokens[ends - 1] == vocabulary.eos).sum())
    text = (
        f"{path} was not written by chameleon preprocess: its tokens are taken as they stand and "
    )
    text += "all of them are trained, and where its documents came from is not known. "
    text += f"{begun:,} of its {counted(len(ends), 'document')} begin with <s>, and {ended:,} end "
    text += "with </s>"
    if file_of(path, ".loss").is_file():
        text += f". The mask {path}.loss is not read"
    return text
