"""Turns a record into a document to train on, a prompt to continue, or a question.

    document_of(record, origin)     all of it, with the answers that are trained
    prompt_of(record, origin)       a conversation ends with the user: the model answers it
    question_of(record, origin)     the same, with the reference answers beside it

The second and the third never show an answer to the model: neither the key ``answer`` or
``answers``, nor the message that ends a conversation if it is the assistant's.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_chameleon.data.documents.image_part import ImagePart, image_part
from megatron_chameleon.data.documents.media import is_encoded
from megatron_chameleon.data.documents.messages import join_texts
from megatron_chameleon.data.documents.pairs import is_pair, join_pair, split_pair
from megatron_chameleon.data.documents.pictures import Beside, find_beside, place_pictures
from megatron_chameleon.data.documents.schema import (
    ASSISTANT,
    USER,
    Document,
    TextPart,
    UnusableDocument,
)
from megatron_chameleon.data.documents.shapes import (
    answer_key,
    form_of,
    link_key,
    read_shape,
    table_of_links,
)
from megatron_chameleon.errors import DataError, one_line
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import ImageFolder

Record = Mapping[str, Any]

NAMES = ("id", "source")
LONGEST_NAME = 200
"""Letters of an id or source; a longer one is cut and ends with its hash."""
REFERENCE_KEYS = ("answers", "answer")
"""The keys of the reference answers of a question, in every form."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record was read."""

    path: str
    number: int
    """Line, row or sample of the file, counted from 1."""
    key: str = ""
    """The key of a tar sample, which is its default id."""
    images: ImageOptions = field(default_factory=ImageOptions)
    """Where images may lie, and how they are read."""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.key or self.number}"

    @property
    def folder(self) -> ImageFolder:
        return _folder_of(self.path, self.images)


@functools.lru_cache(maxsize=16)
def _folder_of(path: str, images: ImageOptions) -> ImageFolder:
    return ImageFolder.of(path, images)


@dataclass(frozen=True)
class Question:
    """A question and the answers that are right."""

    prompt: Document
    """What the model sees. A conversation ends with the user."""
    references: tuple[str, ...]
    """The right answers in text; at least one."""


def parse_line(
    line: bytes, path: str | Path, number: int, images: ImageOptions | None = None
) -> Document:
    """Turn one line of JSON into a document to train on.

    Args:
        line: UTF-8 text of one JSON object.
        path: The file or URL, for relative image paths and errors.
        number: The number of the line, counted from 1.
        images: Where images may lie, and how they are read.

    Raises:
        DataError: If the line is not a JSON object or breaks the schema.
    """
    origin = Origin(str(path), number, images=images or ImageOptions())
    return document_of(parse_json(line, origin.where, number), origin)


def parse_json(line: bytes, where: str, number: int) -> dict[str, Any]:
    """Parse one line of JSON.

    Of a key that occurs twice, the last value counts, as in other parsers. NaN and Infinity, which
    are not JSON but are written by Python, are read.

    Raises:
        DataError: If the line is not a JSON object.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # orjson refuses lone surrogates, NaN and byte order marks
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            what = f"the line is not valid JSON ({one_line(error)})"
            raise DataError(where, what, "Fix or remove the line") from error
    if not isinstance(record, dict):
        what = f"the line must be a JSON object, not {type(record).__name__}"
        raise DataError(where, what, "Write one JSON object per line")
    return record


def document_of(record: Record, origin: Origin, own: Mapping[str, bytes] | None = None) -> Document:
    """Turn a record into a document to train on.

    Args:
        record: The keys and values of a line, row or sample.
        origin: Where it was read.
        own: The picture files that belong to the record, by name, in order.

    Raises:
        DataError: The record has no known form, breaks it, or holds a picture that is not read.
    """
    where, folder = origin.where, origin.folder
    if is_pair(record):
        chosen, rejected = (document_of(r, origin, own) for r in split_pair(record, where))
        return join_pair(chosen, rejected)
    form = form_of(record, where)
    shaped = read_shape(record, form, folder, where)
    used = {*shaped.used, *NAMES}
    if any(isinstance(part, TextPart) and is_encoded(part.text) for part in shaped.parts):
        what = "has the letters of an encoded picture where a text is expected"
        remedy = 'Write it as {"type": "image", "image": ...}'
        raise UnusableDocument(where, what, remedy, "picture written as a text")
    has_pictures = any(isinstance(part, ImagePart) for part in shaped.parts)
    names = None if own is None else list(own)
    beside = find_beside(record, used, folder, where, names, has_pictures, of_record=True)
    if own is not None:
        pictures = (*(image_part(data, folder) for data in own.values()), *beside.pictures)
        beside = Beside(pictures, bool(own) or beside.has_key, beside.unused_keys)
    parts, roles = place_pictures(shaped.parts, shaped.roles, beside, where, form == "content")
    _check_links(record, form, parts, origin)
    if form == "caption" and not any(isinstance(part, ImagePart) for part in parts):
        what = "has a caption, but no picture"
        remedy = "Name the picture in the key `image`, or write `text`"
        raise UnusableDocument(where, what, remedy, "caption without a picture")
    file_name = origin.path.rsplit("/", 1)[-1]
    return Document(
        record_name(record.get("id"), origin.key or f"{file_name}:{origin.number}"),
        record_name(record.get("source"), file_name.split(".")[0]),
        tuple(parts),
        where,
        None if roles is None else tuple(roles),
        origin.number,
        (*beside.unused_keys, *sorted(shaped.unused)) if shaped.unused else beside.unused_keys,
    )


def _check_links(
    record: Record, form: str, parts: Sequence[TextPart | ImagePart], origin: Origin
) -> None:
    """Refuse a row of a table of links, unless the user allows links to be followed."""
    if form not in ("text", "caption") or (key := link_key(record)) is None:
        return
    pictures = [part.image for part in parts if isinstance(part, ImagePart)]
    is_named = pictures == [record[key]] if pictures else form == "caption"
    if is_named and record[key].partition("://")[0].lower() not in origin.images.protocols:
        raise table_of_links(record, key, origin.where)


def prompt_of(record: Record, origin: Origin, own: Mapping[str, bytes] | None = None) -> Document:
    """Turn a record into a prompt to continue; an answer at its end is left out.

    Args:
        record: As in ``document_of``.
        origin: Where it was read.
        own: As in ``document_of``.

    Raises:
        DataError: As ``document_of``, or no message of the user stands at the end.
    """
    return _asked_and_told(record, origin, own)[0]


def question_of(record: Record, origin: Origin) -> Question:
    """Turn a record into a question with its reference answers.

    The references are the key ``answers`` or ``answer`` (a text, a number, a list of these, or
    parts), the form's own key of the answer, the last message of a conversation if it is the
    assistant's, or else the last text of the document.

    Raises:
        DataError: As ``prompt_of``; or there is no reference, or the prompt ends with it.
    """
    prompt, told = _asked_and_told(record, origin)
    where = origin.where
    key = next((k for k in REFERENCE_KEYS if record.get(k) is not None), None)
    if key is None and not is_pair(record):
        key = answer_key(record, form_of(record, where))
    if key is not None:
        references = references_of(record[key], key, where)
        _check_prompt_has_no_answer(prompt, references)
        return Question(prompt, references)
    if told:
        return Question(prompt, (join_texts(told).strip(),))
    last = prompt.content[-1] if prompt.content and prompt.roles is None else None
    if not isinstance(last, TextPart) or not last.text.strip():
        what = "has neither `answers` nor a last text that is the answer"
        raise DataError(where, what, "Add `answers`, a list of texts")
    prompt.content = prompt.content[:-1]
    return Question(prompt, (last.text,))


def references_of(value: Any, key: str, where: str) -> tuple[str, ...]:
    """The reference answers in a value: a text, a number, a list of these, or parts.

    Raises:
        DataError: It is none of these, or it has no text.
    """
    if isinstance(value, dict) and "text" in value and "type" not in value:  # as in SQuAD
        value = value["text"]
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(v, dict) and "type" in v for v in values):
        texts = [v.get("text") for v in values if v["type"] == "text"]
        values = ["".join(text for text in texts if isinstance(text, str))]
    found = [v.get("answer") if isinstance(v, dict) else v for v in values]  # as in VQAv2
    if not found or not all(isinstance(v, str | int | float) for v in found):
        what = f"`{key}` must be a list of texts"
        raise DataError(where, what, "Write at least one text")
    return tuple(v if isinstance(v, str) else json.dumps(v) for v in found)


def _asked_and_told(
    record: Record, origin: Origin, own: Mapping[str, bytes] | None = None
) -> tuple[Document, list[TextPart | ImagePart]]:
    """A record without the answer at its end, and the parts of that answer.

    Of a pair, it is the chosen answer.
    """
    if is_pair(record):
        record, _ = split_pair(record, origin.where)
    else:
        key = answer_key(record, form_of(record, origin.where))
        if key is not None and not _is_content(record[key]):
            record = {k: v for k, v in record.items() if k not in (*REFERENCE_KEYS, key)}
    document = document_of(record, origin, own)
    if document.roles is None:
        return document, []
    stop = len(document.roles)
    while stop and document.roles[stop - 1] == ASSISTANT:
        stop -= 1
    told = list(document.content[stop:])
    document.content, document.roles = document.content[:stop], document.roles[:stop]
    if not document.roles or document.roles[-1] != USER:
        what = "has no message of the user at its end, so there is nothing to answer"
        raise DataError(origin.where, what, "End with a message of the user")
    return document, told


def _is_content(value: Any) -> bool:
    """Whether a value could be the content of a message."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, dict) and "type" in v for v in value)
    return isinstance(value, str) and bool(value.strip())


def _check_prompt_has_no_answer(prompt: Document, references: Collection[str]) -> None:
    """Refuse a document whose last text is the answer that stands beside it."""
    last = prompt.content[-1] if prompt.content else None
    if len(prompt.content) < 2 or not isinstance(last, TextPart):
        return
    if last.text.strip() and last.text.strip() in (text.strip() for text in references):
        what = f"its last text is the answer itself ({last.text.strip()[:40]!r})"
        raise DataError(prompt.where, what, "End the document with the question")


def record_name(value: Any, default: str) -> str:
    """The id or the corpus name in a record, as a string of at most ``LONGEST_NAME`` letters.

    Values that are not strings are written as JSON, so that equal ones have equal names.

    Args:
        value: What the record says; None if it says nothing.
        default: The name of a record that says nothing.
    """
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        value = str(value) if isinstance(value, int) else _as_json(value)
    if len(value) <= LONGEST_NAME:
        return str(value)
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{value[: LONGEST_NAME - 20]}... {digest}"


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
