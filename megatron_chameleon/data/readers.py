"""Files of documents, told apart by their suffix.

- ``.jsonl``, ``.json``, ``.jsonl.gz``, ``.json.gz``: a document a line, see ``documents.py``
- ``.tar``, WebDataset: the files of one key are one document, an image and its ``.txt`` or
  ``.json`` caption
- ``.parquet``, OBELICS-style: parallel lists ``images`` and ``texts``, where one of the two is null

Try: ``chameleon preprocess documents.jsonl --tokenizer DIR --output PREFIX``
"""

import binascii
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_chameleon.data.documents import (
    Document,
    ImagePart,
    TextPart,
    image_part,
    one_line,
    parse_line,
    record_name,
)
from megatron_chameleon.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
JSON_LINES_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass
class ReadProgress:
    """How far ``read_documents`` has come, in bytes of the files as they lie on the disk."""

    read_bytes: int = 0
    total_bytes: int = 0


def read_documents(
    paths: Sequence[str | Path], progress: ReadProgress | None = None
) -> Iterator[Document]:
    """Read the documents of all files, in order.

    Args:
        paths: Files of any of the kinds above, told apart by their suffix.
        progress: Updated while reading, if given.

    Raises:
        DataError: When a file is missing, of no known kind, or broken; it names the file and the
            line.
    """
    progress = progress if progress is not None else ReadProgress()
    readers = [(Path(path), _reader_for(Path(path))) for path in paths]
    progress.total_bytes = sum(path.stat().st_size for path, _ in readers)
    finished_bytes = 0
    for path, reader in readers:
        for document, position_bytes in reader(path):
            progress.read_bytes = finished_bytes + position_bytes
            yield document
        finished_bytes += path.stat().st_size
    progress.read_bytes = finished_bytes


Reader = Callable[[Path], Iterator[tuple[Document, int]]]


def _reader_for(path: Path) -> Reader:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(
            str(path), what, "Give files of documents: .jsonl, .jsonl.gz, .tar or .parquet"
        )
    name = path.name.lower()
    if name.endswith(JSON_LINES_SUFFIXES):
        return _read_json_lines
    if name.endswith(".tar"):
        return _read_tar
    if name.endswith(".parquet"):
        return _read_parquet
    raise DataError(
        str(path),
        "the suffix is of no known kind",
        "Use .jsonl, .json, .jsonl.gz, .json.gz, .tar or .parquet",
    )


def _read_json_lines(path: Path) -> Iterator[tuple[Document, int]]:
    with path.open("rb") as file:
        lines: IO[bytes] | gzip.GzipFile = (
            gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
        )
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline()  # tell() works after readline(), not in a for loop
            except (OSError, EOFError, binascii.Error) as error:
                remedy = "Copy or compress the file again"
                raise DataError(
                    f"{path}:{number}", f"cannot read on ({one_line(error)})", remedy
                ) from error
            if not line:
                return
            if line.strip():
                yield parse_line(line, path, number), file.tell()


def _read_tar(path: Path) -> Iterator[tuple[Document, int]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as file:
        samples = group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
        last_key = "the first sample"
        while True:
            try:
                sample = next(samples, None)
            except Exception as error:  # tarfile and webdataset raise several types
                cause = str(error.args[0] if error.args else error)
                cause = cause.split(" @ <")[0]  # webdataset appends the file object
                what = f"the tar is broken after {last_key} ({' '.join(cause.split())})"
                raise DataError(str(path), what, "Copy or write the tar again") from error
            if sample is None:
                return
            last_key = sample["__key__"]
            yield _tar_document(sample, path), file.tell()


def _tar_document(sample: dict[str, Any], path: Path) -> Document:
    key = sample["__key__"]
    where = f"{path}:{key}"
    metadata: dict[str, Any] = {}
    if "json" in sample:
        try:
            metadata = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            raise DataError(
                where, f"its .json is broken ({one_line(error)})", "Mend or remove the sample"
            ) from error
    caption = metadata.get("caption", metadata.get("text")) if isinstance(metadata, dict) else None
    if "txt" in sample:
        try:
            caption = sample["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(where, "its .txt is not UTF-8", "Write captions as UTF-8") from error
    if not isinstance(caption, str):
        remedy = 'Add KEY.txt, or KEY.json with a "caption"'
        raise DataError(
            where, f"no caption among its files ({', '.join(_suffixes(sample))})", remedy
        )
    images = [sample[suffix] for suffix in _suffixes(sample) if suffix in IMAGE_SUFFIXES]
    # img2dataset leaves captions whose image could not be had: such a document is dropped as one
    # with a missing image.
    image = ImagePart(images[0]) if images else ImagePart(f"{path}/{key}.<image>")
    return Document(key, path.name.split(".")[0], (image, TextPart(caption)), where)


def _suffixes(sample: dict[str, Any]) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


# OBELICS-style parquet


def _read_parquet(path: Path) -> Iterator[tuple[Document, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            str(path), f"not a parquet file ({one_line(error)})", "Copy or write the file again"
        ) from error
    with file:
        missing = {"images", "texts"} - set(file.schema_arrow.names)
        if missing:
            found = ", ".join(file.schema_arrow.names)
            what = f"no column {' and '.join(sorted(missing))} (it has {found})"
            raise DataError(str(path), what, "Write the parallel list columns images and texts")
        columns = [
            name for name in ("id", "source", "images", "texts") if name in file.schema_arrow.names
        ]
        rows, size_bytes, row = file.metadata.num_rows, path.stat().st_size, 0
        batches = file.iter_batches(batch_size=256, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                what = f"broken after row {row} of {rows} ({one_line(error)})"
                raise DataError(str(path), what, "Copy or write the file again") from error
            if batch is None:
                return
            for record in batch.to_pylist():
                row += 1
                yield _parquet_document(record, path, row), size_bytes * row // rows


def _parquet_document(record: dict[str, Any], path: Path, row: int) -> Document:
    where = f"{path}:{row}"
    images, texts = record["images"] or [], record["texts"] or []
    if not isinstance(images, list) or not isinstance(texts, list):
        what = "images and texts are no lists"
        raise DataError(where, what, "Write two list columns, one of the two null at each place")
    if len(images) != len(texts) or not images:
        what = f"{len(images)} images beside {len(texts)} texts"
        raise DataError(where, what, "Write two lists of the same length, at least 1")
    pairs = enumerate(zip(images, texts, strict=True))
    parts = tuple(_parquet_part(i, image, text, path, where) for i, (image, text) in pairs)
    identity = record_name(record, "id", f"{path.name}:{row}", where)
    source = record_name(record, "source", path.name.split(".")[0], where)
    return Document(identity, source, parts, where)


def _parquet_part(
    position: int, image: Any, text: Any, path: Path, where: str
) -> TextPart | ImagePart:
    if (image is None) == (text is None):
        both = "both null" if image is None else "both there"
        what = f"images[{position}] and texts[{position}] are {both}"
        raise DataError(where, what, "Leave exactly one of the two null at each place")
    if text is not None:
        if not isinstance(text, str):
            what = f"texts[{position}] is a {type(text).__name__}"
            raise DataError(where, what, "Write strings")
        return TextPart(text)
    if isinstance(image, dict):  # the Image feature of Hugging Face datasets
        image = image.get("bytes") or image.get("path") or b""
    if not isinstance(image, str | bytes):
        what = f"images[{position}] is a {type(image).__name__}"
        raise DataError(where, what, "Write paths or bytes")
    return image_part(image, path.parent, where)
