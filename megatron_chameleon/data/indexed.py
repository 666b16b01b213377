"""Token files: PREFIX.bin and PREFIX.idx as Megatron's, and the sidecar PREFIX.json.

Layout of the .idx (little endian): 9 bytes ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code,
uint64 sequences, uint64 document boundaries, then int32 length and int64 byte offset of each
sequence, and int64 document boundaries (the first is 0). The .bin is the token ids of all
sequences, one after the other. Here one sequence is one document. The sidecar names the tokenizer
by its fingerprint; it is removed first and written last, so that files with a sidecar are whole.
megatron-core reads and writes the two files; the checks in front of it are ours, because it asserts
on broken files, or reads beyond their end.

Source: megatron/core/datasets/indexed_dataset.py.
"""

import contextlib
import json
import os
import struct
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer

# megatron-core warns at import, several times, that Transformer Engine is not there
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

FORMAT = "megatron_chameleon.tokens/1"
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC = b"MMIDIDX\x00\x00"


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
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped documents by reason; PREFIX.dropped.jsonl lists them."""
    format: str = FORMAT


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """uint16 for up to 65,536 ids, the paper's number; megatron-core's rule stops short of it."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


class TokenFileWriter:
    """Writes a token file under temporary names beside PREFIX.

    ``commit`` puts it in place; leaving the context without it removes everything.

    Args:
        prefix: Path of the files without .bin and .idx.
        tokenizer: The tokenizer of the token ids that will be added.

    Raises:
        DataError: From any method, when the disk does not take the files.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer) -> None:
        self.prefix = Path(prefix)
        self.tokenizer = tokenizer
        self.documents = self.tokens = self.image_tokens = self.images = 0
        self.dropped: dict[str, int] = {}
        self._dtype = token_dtype(tokenizer.vocabulary.size)
        self._temporary = {
            suffix: self._beside(suffix) for suffix in (".bin", ".idx", ".dropped.jsonl", ".json")
        }

    def _beside(self, suffix: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{os.getpid()}.tmp{suffix}")

    def path(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def __enter__(self) -> "TokenFileWriter":
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(str(self._temporary[".bin"]), dtype=self._dtype)
            self._dropped_file = self._temporary[".dropped.jsonl"].open("w", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # a full disk fails once more here; the first error counts
        with contextlib.suppress(OSError):
            self._builder.data_file.close()
        with contextlib.suppress(OSError):
            self._dropped_file.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def add(self, token_ids: np.ndarray, images: int) -> None:
        """Append one document: int [tokens] in [0, vocab_size), with so many images."""
        vocabulary = self.tokenizer.vocabulary
        assert token_ids.min() >= 0 and token_ids.max() < vocabulary.size, (
            "token ids outside the vocabulary"
        )
        try:
            self._builder.add_document(token_ids, [len(token_ids)])
        except OSError as error:
            raise self._cannot_write(error) from error
        self.documents += 1
        self.tokens += len(token_ids)
        self.images += images
        self.image_tokens += int(vocabulary.is_image_code(token_ids).sum()) + 2 * images

    def drop(self, identity: str, where: str, reason: str, detail: str) -> None:
        """Count and list one document that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        record = {"id": identity, "where": where, "reason": reason, "detail": detail}
        try:
            self._dropped_file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._cannot_write(error) from error

    def commit(self) -> TokenFileInfo:
        """Put the new files in the place of old ones. Until here, old ones are untouched."""
        info = TokenFileInfo(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            tokenizer=str(self.tokenizer.folder),
            vocab_size=self.tokenizer.vocabulary.size,
            dtype=np.dtype(self._dtype).name,
            documents=self.documents,
            tokens=self.tokens,
            image_tokens=self.image_tokens,
            images=self.images,
            bin_bytes=self.tokens * np.dtype(self._dtype).itemsize,
            dropped=dict(self.dropped),
        )
        try:
            self._builder.finalize(str(self._temporary[".idx"]))
            self._dropped_file.close()
            self._temporary[".json"].write_text(
                json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8"
            )
            # from here to the last line the files are incomplete, and say so
            self.path(".json").unlink(missing_ok=True)
            self._temporary[".bin"].replace(self.path(".bin"))
            self._temporary[".idx"].replace(self.path(".idx"))
            if self.dropped:
                self._temporary[".dropped.jsonl"].replace(self.path(".dropped.jsonl"))
            else:
                self.path(".dropped.jsonl").unlink(missing_ok=True)
            self._temporary[".json"].replace(self.path(".json"))
        except OSError as error:
            raise self._cannot_write(error) from error
        return info

    def _cannot_write(self, error: OSError) -> DataError:
        remedy = "Choose an --output on a disk that is writable and has room"
        return DataError(
            str(self.prefix), f"cannot write the token file ({error.strerror})", remedy
        )


class TokenFile:
    """A whole token file, memory-mapped. Made by ``open_token_file``."""

    def __init__(self, prefix: str, info: TokenFileInfo) -> None:
        self.prefix = prefix
        self.info = info
        self._dataset = IndexedDataset(prefix)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents]."""
        return self._dataset.sequence_lengths

    @property
    def offsets(self) -> np.ndarray:
        """Byte of the .bin where each document begins, int64 [documents], memory-mapped."""
        return self._dataset.index.sequence_pointers

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` - 1, counted through all documents, read-only."""
        dtype = np.dtype(self.info.dtype)
        return self._dataset.bin_reader.read(dtype, stop - start, start * dtype.itemsize)

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of one document or of a part of it, [length] in the dtype of the file,
        read-only.

        Args:
            document: Its position in the file.
            start: First token.
            length: Number of tokens; None reads to the end.
        """
        assert 0 <= document < len(self), f"document {document} of {len(self)}"
        available = int(self.lengths[document]) - start
        length = available if length is None else length
        # megatron-core would go on into the next document
        assert start >= 0 and 0 <= length <= available, (
            f"tokens {start}+{length} of {available + start}"
        )
        return self._dataset.get(document, start, length)


def read_info(prefix: str | Path) -> TokenFileInfo:
    """Read the sidecar of a token file.

    Raises:
        DataError: When one of the three files is missing, or the sidecar is none.
    """
    remedy = "Write the files with: chameleon preprocess INPUTS --tokenizer DIR --output PREFIX"
    missing = [
        suffix for suffix in (".bin", ".idx", ".json") if not Path(f"{prefix}{suffix}").is_file()
    ]
    if missing == [".json"]:
        raise DataError(
            str(prefix), "the token file is incomplete, its .json (written last) is missing", remedy
        )
    if missing:
        raise DataError(str(prefix), f"no token file here, {' and '.join(missing)} missing", remedy)
    try:
        record: Any = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(TokenFileInfo)}
        if record["format"] != FORMAT:
            what = f"the format is {record['format']!r}, this version reads {FORMAT!r}"
            raise DataError(f"{prefix}.json", what, remedy)
        return TokenFileInfo(**{key: value for key, value in record.items() if key in known})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{prefix}.json", f"not the sidecar of a token file ({error})", remedy
        ) from error


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
    tokens = _check_index(f"{prefix}.idx", info)
    itemsize = np.dtype(info.dtype).itemsize
    found, expected = Path(f"{prefix}.bin").stat().st_size, tokens * itemsize
    if found != expected:
        what = f"{found} bytes, its .idx names {tokens} tokens, {expected} bytes"
        remedy = "Copy the file again or run chameleon preprocess again"
        raise DataError(f"{prefix}.bin", what, remedy)
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


def _check_index(path: str, info: TokenFileInfo) -> int:
    """Check an .idx against its own header and the sidecar; the number of tokens it names."""
    remedy = "Copy the file again or run chameleon preprocess again"
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(_IDX_HEADER.size)
        if len(head) < _IDX_HEADER.size:
            raise DataError(
                path, f"{size} bytes, shorter than the header of {_IDX_HEADER.size}", remedy
            )
        magic, version, code, sequences, boundaries = _IDX_HEADER.unpack(head)
        if magic != _IDX_MAGIC or version != 1:
            raise DataError(
                path,
                f"starts with {head[:17]!r}, not with the header of a Megatron .idx, version 1",
                remedy,
            )
        names = {entry.value: entry.name for entry in DType}
        if names.get(code) != info.dtype:
            found = names.get(code, f"unknown code {code}")
            raise DataError(path, f"holds {found} tokens, its .json says {info.dtype}", remedy)
        expected = _IDX_HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise DataError(
                path,
                f"{size} bytes, its header names {sequences} documents, {expected} bytes",
                remedy,
            )
        if sequences != info.documents or boundaries != sequences + 1:
            raise DataError(
                path, f"holds {sequences} documents, its .json says {info.documents}", remedy
            )
        if sequences == 0:
            raise DataError(
                path, "holds 0 documents", "Run chameleon preprocess on inputs that have some"
            )
        # the last document tells the sum: reading all lengths would take as long as there are many
        file.seek(_IDX_HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(_IDX_HEADER.size + 12 * sequences - 8)
        (offset,) = struct.unpack("<q", file.read(8))
    return offset // np.dtype(info.dtype).itemsize + length
