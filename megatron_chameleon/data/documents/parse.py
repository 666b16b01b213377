"""Turns blocks of an input, or whole inputs, into documents.

    from megatron_chameleon.data.documents.parse import read_documents
    for document in read_documents(["data/*.jsonl.zst", "s3://bucket/pairs-*.tar"]): ...

``inputs/files.py`` knows the kinds of file, and ``inputs/blocks.py`` cuts them into blocks. A line
of JSON and a parquet row are a record of the same forms (``shapes.py``). So is the ``.json`` of a
WebDataset sample; the sample's picture files stand beside its text, and ``KEY.txt`` is its caption.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.data.documents.image_part import ImageError, ImagePart, missing_image
from megatron_chameleon.data.documents.media import (
    AUDIO,
    IMAGE,
    VIDEO,
    medium_of_bytes,
    medium_of_suffix,
)
from megatron_chameleon.data.documents.pictures import shown_key
from megatron_chameleon.data.documents.records import (
    Origin,
    document_of,
    parse_json,
    prompt_of,
    record_name,
)
from megatron_chameleon.data.documents.schema import Document, UnusableDocument
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.decoding.json_values import BYTE_ORDER_MARK, check_values
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.form_keys import FORM_KEYS
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    Block,
    Fault,
    FileSlice,
    ParquetRows,
    TarSamples,
)
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import DataError, one_line
from megatron_chameleon.files import open_to_read
from megatron_chameleon.images.options import ImageOptions

logger = logging.getLogger(__name__)

Maker = Callable[..., Document]
"""``document_of`` or ``prompt_of``: what to make of a record."""

MOST_SHOWN_KEYS = 20
MOST_KEPT_KEYS = 1000
"""Names of keys that are kept for the list of unused keys; more are only counted as more."""
_CAPTION_SUFFIXES = ("txt", "caption", "text")


def read_documents(
    paths: Sequence[str | Path], make: Maker = document_of, images: ImageOptions | None = None
) -> Iterator[Document]:
    """Read the documents of all inputs, in order.

    Args:
        paths: Files, globs or URLs (``inputs/files.py``).
        make: What to make of each record.
        images: Where images may lie, and how they are read.

    Raises:
        DataError: If a file is missing, damaged or of an unknown kind, or a document is broken. The
            error names the file and the line.
    """
    inputs = find_inputs(paths)
    unused = UnusedKeys()
    for block in read_blocks(inputs, plan_ranges(inputs)):
        for item in unused.watch(parse_block(block, make, images=images)):
            if isinstance(item, Fault):
                raise item.error
            yield item
    unused.report()


def read_prompts(paths: Sequence[str | Path], images: ImageOptions | None = None) -> list[Document]:
    """Read prompts to continue; an answer at the end of a conversation is left out.

    Raises:
        DataError: As ``read_documents``; or a conversation has nothing to answer.
    """
    return list(read_documents(paths, prompt_of, images))


class UnusedKeys:
    """Collects the keys of records that nobody reads, and lists them once."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._last: Collection[str] = ()

    def add(self, keys: Collection[str]) -> None:
        """Add keys; past ``MOST_KEPT_KEYS`` they are passed over."""
        if keys == self._last:  # those of one record are mostly those of the one before it
            return
        self._last = keys
        for key in keys:
            if len(self.names) >= MOST_KEPT_KEYS:
                return
            self.names.add(shown_key(key))

    def watch(self, items: Iterable[Document | Fault]) -> Iterator[Document | Fault]:
        """The same items; the unused keys of the documents are added on the way."""
        for item in items:
            if isinstance(item, Document) and item.unused_keys:
                self.add(item.unused_keys)
            yield item

    def report(self) -> None:
        """Log the list, if there is anything to list."""
        if not self.names:
            return
        listed = sorted(self.names)
        more = len(listed) - MOST_SHOWN_KEYS
        tail = f" and {'at least ' if len(listed) >= MOST_KEPT_KEYS else ''}{more:,} more"
        shown = ", ".join(listed[:MOST_SHOWN_KEYS]) + (tail if more > 0 else "")
        logger.warning("keys not used: %s", shown)


def parse_block(
    block: Block,
    make: Maker = document_of,
    ignored: frozenset[str] = frozenset(),
    images: ImageOptions | None = None,
) -> Iterator[Document | Fault]:
    """Parse the documents of a block; each broken one is replaced by a ``Fault``.

    Args:
        block: The block.
        make: What to make of each record.
        ignored: Keys that are left out of every record, whatever they hold.
        images: Where images may lie, and how they are read.

    Raises:
        DataError: If the file has become shorter since the block was cut.
    """
    payload = block.payload
    images = images or ImageOptions()
    if isinstance(payload, Fault):
        yield replace(payload, corpus_name=payload.corpus_name or _stem(block.path))
    elif isinstance(payload, TarSamples):
        yield from _parse_samples(block, payload, make, ignored, images)
    elif isinstance(payload, ParquetRows):
        yield from _parse_rows(block, payload, make, ignored, images)
    else:
        yield from _parse_lines(block, payload, make, ignored, images)


def _without(record: dict[str, Any], ignored: frozenset[str]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ignored} if ignored else record


def _parse_lines(
    block: Block,
    payload: bytes | FileSlice,
    make: Maker,
    ignored: frozenset[str],
    images: ImageOptions,
) -> Iterator[Document | Fault]:
    content = _read_slice(block.path, payload) if isinstance(payload, FileSlice) else payload
    # a single line, which may be large, is not copied
    is_single = content.find(b"\n") in (-1, len(content) - 1)
    lines = [content] if is_single else content.split(b"\n")
    for number, line in enumerate(lines, start=block.record + 1):
        if not line or line.isspace():
            continue
        origin = Origin(block.path, number, images=images)
        where = origin.where
        record: dict[str, Any] = {}
        try:
            check_values(line, where)
            # files that were put one behind the other have a byte order mark in the middle
            record = parse_json(line.removeprefix(BYTE_ORDER_MARK), where, number)
            yield make(_without(record, ignored), origin)
        except DataError as error:
            yield _fault(error, block.path, record, f"{_name(block.path)}:{number}")


def _fault(error: DataError, path: str, record: Mapping[str, Any], default: str) -> Fault:
    name = record_name(record.get("id"), default)
    reason = error.reason if isinstance(error, UnusableDocument | ImageError) else BROKEN_DOCUMENT
    return Fault(error, reason, name, record_name(record.get("source"), _stem(path)))


def _read_slice(path: str, part: FileSlice) -> bytes:
    with open_to_read(path) as file:
        file.seek(part.offset)
        content = file.read(part.size)
    if len(content) < part.size:
        what = f"the file now ends before byte {part.offset + part.size}: it has become shorter"
        raise DataError(path, what, "Restore it, and run the same command again")
    return content


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _stem(path: str) -> str:
    """The default corpus name of a document: the file's name up to its first dot."""
    return _name(path).split(".")[0]


# WebDataset


def _parse_samples(
    block: Block,
    payload: TarSamples,
    make: Maker,
    ignored: frozenset[str],
    images: ImageOptions,
) -> Iterator[Document | Fault]:
    for record, sample in enumerate(payload.samples, start=block.record + 1):
        origin = Origin(block.path, record, sample["__key__"], images)
        try:
            yield _tar_document(sample, origin, make, ignored)
        except DataError as error:
            yield _fault(error, block.path, {}, sample["__key__"])


def _tar_document(
    sample: dict[str, Any], origin: Origin, make: Maker, ignored: frozenset[str]
) -> Document:
    files = {name: data for name, data in sample.items() if not name.startswith("__")}
    base = origin.key.rsplit("/", 1)[-1]
    pictures: dict[str, bytes] = {}
    unused = []
    for suffix, data in files.items():
        if suffix in (*_CAPTION_SUFFIXES, "json") or suffix in ignored:
            continue
        medium = medium_of_suffix(f"{base}.{suffix}") or medium_of_bytes(data)
        if medium in (AUDIO, VIDEO):
            name = "a video" if medium == VIDEO else "sound"
            what = f"its .{shown_key(suffix)} holds {name}, which is not read"
            remedy = "Remove the sample or the file"
            raise UnusableDocument(origin.where, what, remedy, "sound or video")
        if medium == IMAGE:
            pictures[f"{base}.{suffix}".lower()] = data
        else:
            unused.append(f".{suffix}")
    record = _without(_metadata(files, origin.where), ignored)
    unused += [key for key in ("id", "source") if record.pop(key, None) is not None]
    caption = _caption(files, origin.where)
    if caption is None and isinstance(record.get("caption"), str):
        caption = record["caption"]
    if caption is not None:
        forms = [key for key in FORM_KEYS if key in record]
        told = {key: record.pop(key) for key in forms}
        unused += [k for k, v in told.items() if v is not None and v not in (caption, "")]
        record["text"] = caption
    elif not any(record.get(key) is not None for key in FORM_KEYS):
        what = f"no caption among its files ({', '.join(map(shown_key, files))})"
        raise DataError(origin.where, what, 'Add KEY.txt, or KEY.json with a "caption"')
    if isinstance(record.get("text"), str):
        # One rule for .txt and .json: a caption ends with a line break in most files.
        record["text"] = record["text"].removeprefix("\ufeff").strip()
    document = make(record, origin, pictures)
    has_picture = any(isinstance(part, ImagePart) for part in document.content)
    if document.roles is None and not has_picture:
        # img2dataset leaves captions whose image could not be downloaded. Such a document counts
        # as one with a missing image, and is dropped.
        missing = missing_image(f"{origin.path}/{origin.key}.<image>", origin.folder)
        document.content = (missing, *document.content)
    document.unused_keys = (*document.unused_keys, *unused)
    return document


def _metadata(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The object in the ``.json`` of a sample; empty if there is none."""
    if "json" not in files:
        return {}
    try:
        found = json.loads(files["json"].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = f"its .json is not valid JSON ({one_line(error)})"
        raise DataError(where, what, "Fix or remove the sample") from error
    return found if isinstance(found, dict) else {}


def _caption(files: Mapping[str, bytes], where: str) -> str | None:
    """The text beside a sample's picture; None if no file holds one."""
    found: dict[str, str] = {}
    for suffix in _CAPTION_SUFFIXES:
        if suffix not in files:
            continue
        try:
            found[suffix] = files[suffix].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            what = f"its .{suffix} is not UTF-8"
            raise DataError(where, what, "Write captions as UTF-8") from error
    if len(set(found.values())) > 1:
        what = f"has different captions in {' and '.join(f'.{suffix}' for suffix in found)}"
        raise DataError(where, what, "Keep one of them")
    return next(iter(found.values()), None)


# Parquet


def _parse_rows(
    block: Block,
    payload: ParquetRows,
    make: Maker,
    ignored: frozenset[str],
    images: ImageOptions,
) -> Iterator[Document | Fault]:
    import pyarrow

    with pyarrow.ipc.open_stream(payload.stream) as stream:
        records = stream.read_all()
    for position in range(records.num_rows):
        origin = Origin(block.path, block.record + position + 1, images=images)
        record: dict[str, Any] = {}
        try:
            # raises if a text is not UTF-8
            (record,) = records.slice(position, 1).to_pylist()
            document = make(_without(record, ignored), origin)
            if payload.unread:
                document.unused_keys = (*document.unused_keys, *payload.unread)
            yield document
        except (DataError, ValueError, pyarrow.ArrowException) as error:
            if not isinstance(error, DataError):
                what = f"cannot be decoded ({one_line(error)})"
                error = DataError(origin.where, what, "Write the row again")
            yield _fault(error, block.path, record, f"{_name(block.path)}:{origin.number}")
