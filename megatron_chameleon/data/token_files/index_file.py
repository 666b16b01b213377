"""The .idx, Megatron's index of the documents in the .bin: finishing it, and checking it.

While a token file is written, its .idx holds an empty header and the lengths. The header, the byte
offsets and the document boundaries follow when the last document is known. ``format.py`` has the
layout.

megatron-core's own builder holds the lengths of all documents as Python numbers, and its reader
asserts on broken files or reads beyond their end. So both are written here; the bytes are the same.
"""

import os
from pathlib import Path
from typing import IO

import numpy as np

from megatron_chameleon.data.token_files.format import (
    IDX_DTYPES,
    IDX_HEADER,
    IDX_MAGIC,
    TokenFileInfo,
)
from megatron_chameleon.errors import DataError

CHUNK_DOCUMENTS = 1 << 20
"""Documents whose lengths and offsets are in memory at a time."""
_REMEDY = "Copy the file again or run chameleon preprocess again"


def finish_index(file: IO[bytes], path: Path, documents: int, dtype: np.dtype) -> None:
    """Write the header, the byte offsets and the document boundaries of an .idx.

    Args:
        file: The .idx, open for writing behind the last length.
        path: Its path.
        documents: Number of documents.
        dtype: Type of the tokens in the .bin.
    """
    file.flush()
    # A process that was killed here may have left offsets behind the lengths.
    os.truncate(file.fileno(), IDX_HEADER.size + 4 * documents)
    code = next(code for code, name in IDX_DTYPES.items() if name == dtype.name)
    header = IDX_HEADER.pack(IDX_MAGIC, 1, code, documents, documents + 1)
    with path.open("r+b") as index:
        index.write(header)
    offset = 0
    with path.open("rb") as index:
        index.seek(IDX_HEADER.size)
        for start in range(0, documents, CHUNK_DOCUMENTS):
            count = min(CHUNK_DOCUMENTS, documents - start)
            lengths = np.fromfile(index, dtype="<i4", count=count).astype("<i8")
            ends = offset + np.cumsum(lengths) * dtype.itemsize
            file.write((ends - lengths * dtype.itemsize).tobytes())
            offset = int(ends[-1])
    for start in range(0, documents + 1, CHUNK_DOCUMENTS):
        stop = min(start + CHUNK_DOCUMENTS, documents + 1)
        file.write(np.arange(start, stop, dtype="<i8").tobytes())
    file.flush()


def check_index(path: str, info: TokenFileInfo) -> None:
    """Check the header, the size and both ends of an .idx against the sidecar.

    This takes the same time whatever the number of documents.

    Args:
        path: Of the .idx.
        info: The sidecar of its token file.

    Raises:
        DataError: They do not fit each other, or there are no documents.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        sequences = _check_header(path, file.read(IDX_HEADER.size), size, info)
        file.seek(IDX_HEADER.size + 4 * (sequences - 1))
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(IDX_HEADER.size + 12 * sequences - 8)
        offset, first = np.frombuffer(file.read(16), dtype="<i8")
        file.seek(size - 8)
        last = int.from_bytes(file.read(8), "little", signed=True)
    end = int(offset) + length * np.dtype(info.dtype).itemsize
    if end != info.bin_bytes or first != 0 or last != sequences:
        what = f"its last document ends at byte {end}, but its .json says {info.bin_bytes}"
        raise DataError(path, what, _REMEDY)


def _check_header(path: str, head: bytes, size: int, info: TokenFileInfo) -> int:
    """Check the first bytes and the size of an .idx.

    Returns:
        The number of documents, at least 1.
    """
    if len(head) < IDX_HEADER.size:
        what = f"has {size} bytes, fewer than its header of {IDX_HEADER.size}"
        raise DataError(path, what, _REMEDY)
    magic, version, code, sequences, boundaries = IDX_HEADER.unpack(head)
    if magic != IDX_MAGIC or version != 1:
        what = f"starts with {head[:17]!r}, not with the header of a Megatron .idx of version 1"
        raise DataError(path, what, _REMEDY)
    if IDX_DTYPES.get(code) != info.dtype:
        found = IDX_DTYPES.get(code, f"unknown code {code}")
        raise DataError(path, f"holds {found} tokens, but its .json says {info.dtype}", _REMEDY)
    expected = IDX_HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        what = f"has {size} bytes; its header names {sequences} documents, which take {expected}"
        raise DataError(path, what, _REMEDY)
    if sequences != info.documents or boundaries != sequences + 1:
        what = f"holds {sequences} documents, but its .json says {info.documents}"
        raise DataError(path, what, _REMEDY)
    if sequences == 0:
        remedy = "Run chameleon preprocess on inputs that have some"
        if info.holdout is not None:
            remedy = "Run chameleon preprocess with a larger --holdout, or on more documents"
        raise DataError(path, "holds 0 documents", remedy)
    return int(sequences)
