"""Turns blocks of an input, or whole inputs, into documents.

    from megatron_chameleon.data.documents.parse import read_documents
    for document in read_documents(["data/*.jsonl.zst", "s3://bucket/pairs-*.tar"]): ...

``inputs/files.py`` knows the kinds of file, ``inputs/blocks.py`` cuts them into blocks, and
``schema.py`` has the schema of lines of JSON. The other kinds of record are:

- WebDataset: an image and its ``.txt`` or ``.json`` caption; the image comes first
- OBELICS-style parquet: parallel lists ``images`` and ``texts``, one of which is null at each place
- parquet with a column ``text``, or with ``messages`` as in lines of JSON
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_chameleon.data.documents.image_part import ImagePart, folder_of, image_part, one_line
from megatron_chameleon.data.documents.schema import (
    Document,
    TextPart,
    parse_line,
    parse_messages,
    record_name,
)
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    Block,
    Fault,
    FileSlice,
    ParquetRows,
    TarSamples,
)
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


def read_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Read the documents of all inputs, in order.

    Args:
        paths: Files, globs or URLs (``inputs/files.py``).

    Raises:
        DataError: If a file is missing, damaged or of an unknown kind, or a document is broken. The
            error names the file and the line.
    """
    inputs = find_inputs(paths)
    for block in read_blocks(inputs, plan_ranges(inputs)):
        for item in parse_block(block):
            if isinstance(item, Fault):
                raise item.error
            yield item


def parse_block(block: Block) -> Iterator[Document | Fault]:
    """Parse the documents of a block; each broken one is replaced by a ``Fault``.

    Raises:
        DataError: If the file has become shorter since the block was cut.
    """
    payload = block.payload
    if isinstance(payload, Fault):
        yield payload
    elif isinstance(payload, TarSamples):
        yield from _parse_samples(block, payload)
    elif isinstance(payload, ParquetRows):
        yield from _parse_rows(block, payload)
    else:
        yield from _parse_lines(block, payload)


def _parse_lines(block: Block, payload: bytes | FileSlice) -> Iterator[Document | Fault]:
    content = _read_slice(block.path, payload) if isinstance(payload, FileSlice) else payload
    for number, line in enumerate(content.split(b"\n"), start=block.record + 1):
        if not line or line.isspace():
            continue
        try:
            yield parse_line(line, block.path, number)
        except DataError as error:
            yield Fault(error, BROKEN_DOCUMENT, f"{_name(block.path)}:{number}", _stem(block.path))


def _read_slice(path: str, part: FileSlice) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(part.offset)
        content = file.read(part.size)
    if len(content) < part.size:
        what = f"the file now ends before byte {part.offset + part.size}: it has become shorter"
        raise DataError(path, what, "Do not change inputs while they are read")
    return content


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _stem(path: str) -> str:
    """The default corpus name of a document: the file's name up to its first dot."""
    return _name(path).split(".")[0]


# WebDataset


def _parse_samples(block: Block, payload: TarSamples) -> Iterator[Document | Fault]:
    for record, sample in enumerate(payload.samples, start=block.record + 1):
        try:
            yield _tar_document(sample, block.path, record)
        except DataError as error:
            yield Fault(error, BROKEN_DOCUMENT, sample["__key__"], _stem(block.path))


def _tar_document(sample: dict[str, Any], path: str, record: int) -> Document:
    key = sample["__key__"]
    where = f"{path}:{key}"
    metadata: dict[str, Any] = {}
    if "json" in sample:
        try:
            metadata = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            what = f"its .json is not valid JSON ({one_line(error)})"
            raise DataError(where, what, "Fix or remove the sample") from error
    caption = metadata.get("caption", metadata.get("text")) if isinstance(metadata, dict) else None
    if "txt" in sample:
        try:
            caption = sample["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(where, "its .txt is not UTF-8", "Write captions as UTF-8") from error
    if not isinstance(caption, str):
        what = f"no caption among its files ({', '.join(_suffixes(sample))})"
        raise DataError(where, what, 'Add KEY.txt, or KEY.json with a "caption"')
    images = [sample[suffix] for suffix in _suffixes(sample) if suffix in IMAGE_SUFFIXES]
    # img2dataset leaves captions whose image could not be downloaded. Such a document counts as one
    # with a missing image, and is dropped.
    image = ImagePart(images[0]) if images else ImagePart(f"{path}/{key}.<image>")
    return Document(key, _stem(path), (image, TextPart(caption)), where, record=record)


def _suffixes(sample: dict[str, Any]) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


# Parquet


def _parse_rows(block: Block, payload: ParquetRows) -> Iterator[Document | Fault]:
    import pyarrow

    with pyarrow.ipc.open_stream(payload.stream) as stream:
        records = stream.read_all()
    for position in range(records.num_rows):
        row = block.record + position + 1
        try:
            # raises if a text is not UTF-8
            (record,) = records.slice(position, 1).to_pylist()
            yield _parquet_document(record, block.path, row)
        except (DataError, ValueError, pyarrow.ArrowException) as error:
            if not isinstance(error, DataError):
                where, what = f"{block.path}:{row}", f"cannot be decoded ({one_line(error)})"
                error = DataError(where, what, "Write the row again")
            yield Fault(error, BROKEN_DOCUMENT, f"{_name(block.path)}:{row}", _stem(block.path))


def _parquet_document(record: dict[str, Any], path: str, row: int) -> Document:
    where = f"{path}:{row}"
    document_id = record_name(record, "id", f"{_name(path)}:{row}", where)
    corpus_name = record_name(record, "source", _stem(path), where)
    parts: tuple[TextPart | ImagePart, ...]
    roles = None
    if "messages" in record:
        parts, roles = parse_messages(record["messages"], folder_of(path), where)
    elif "text" in record:
        if not isinstance(record["text"], str):
            what = f"text must be a string, not {type(record['text']).__name__}"
            raise DataError(where, what, "Write strings into the column")
        parts = (TextPart(record["text"]),)
    else:
        parts = _interleaved(record, path, where)
    return Document(document_id, corpus_name, parts, where, roles, row)


def _interleaved(record: dict[str, Any], path: str, where: str) -> tuple[TextPart | ImagePart, ...]:
    images, texts = record["images"] or [], record["texts"] or []
    if not isinstance(images, list) or not isinstance(texts, list):
        what = "images and texts must be lists"
        raise DataError(
            where, what, "Write two list columns; at each place one of the two must be null"
        )
    if len(images) != len(texts) or not images:
        what = f"images has {len(images)} entries, but texts has {len(texts)}"
        raise DataError(where, what, "Write two lists of the same length, at least 1")
    pairs = enumerate(zip(images, texts, strict=True))
    return tuple(_parquet_part(i, image, text, path, where) for i, (image, text) in pairs)


def _parquet_part(
    position: int, image: Any, text: Any, path: str, where: str
) -> TextPart | ImagePart:
    if (image is None) == (text is None):
        both = "both null" if image is None else "both set"
        what = f"images[{position}] and texts[{position}] are {both}"
        raise DataError(where, what, "Set exactly one of the two at each place")
    if text is not None:
        if not isinstance(text, str):
            what = f"texts[{position}] must be a string, not {type(text).__name__}"
            raise DataError(where, what, "Write strings into the list")
        return TextPart(text)
    if isinstance(image, dict):  # the Image feature of Hugging Face datasets
        image = image.get("bytes") or image.get("path") or b""
    if not isinstance(image, str | bytes):
        what = f"images[{position}] must be a path or bytes, not {type(image).__name__}"
        raise DataError(where, what, "Write paths or bytes into the list")
    return image_part(image, folder_of(path), where)
