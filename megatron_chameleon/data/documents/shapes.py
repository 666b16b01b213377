"""The forms that a record may have. Each is known by one of its keys: ``FORMS`` lists them.

A record has one of the keys ``content``, ``text``, ``messages`` and ``conversations``, or else it
is of the first of the other forms whose key it has. To add a form, write a function and an entry of
``FORMS``, and its key in ``inputs/form_keys.py``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.data.documents.interleaved import (
    PICTURES_OF_TEXT_LIST,
    parse_parallel,
    parse_text_list,
)
from megatron_chameleon.data.documents.media import is_link
from megatron_chameleon.data.documents.messages import parse_content, parse_messages
from megatron_chameleon.data.documents.pictures import Part, shown_key
from megatron_chameleon.data.documents.schema import (
    ASSISTANT,
    SYSTEM,
    USER,
    TextPart,
    UnusableDocument,
)
from megatron_chameleon.data.inputs.form_keys import FIRST_FORM_KEYS, LINK_KEYS, OTHER_FORM_KEYS
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.references import ImageFolder

Record = Mapping[str, Any]

ANSWER_KEYS = ("answer", "completion", "response", "output")
"""The keys of the answer to a prompt; the first one with a value counts."""
TABLE_OF_LINKS = "link to a picture"
_CONTEXT_KEYS = ("input", "context")


@dataclass(frozen=True, slots=True)
class Shaped:
    """A record's own parts, before the pictures beside them are placed."""

    parts: tuple[Part, ...]
    roles: tuple[str, ...] | None
    used: frozenset[str]
    """The keys that were read."""
    unused: frozenset[str] = frozenset()
    """Keys inside of messages and parts that were not read."""


def form_of(record: Record, where: str) -> str:
    """The key that tells a record's form.

    Raises:
        DataError: It has none of these keys, or several.
    """
    found = [key for key in FIRST_FORM_KEYS if record.get(key) is not None]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        what = f"has the keys {' and '.join(found)} at once"
        raise DataError(where, what, "Write content, text, messages, or prompt and answer")
    for key in OTHER_FORM_KEYS:
        if record.get(key) is not None:
            return key
    for key in (*FIRST_FORM_KEYS, *OTHER_FORM_KEYS):
        if key in record:
            return key  # its reader says that null is no text
    if (link := link_key(record)) is not None:
        raise table_of_links(record, link, where)
    keys = ", ".join(map(shown_key, record))[:200] or "no key"
    what = f"has none of the keys content, text, messages and prompt (it has {keys})"
    raise DataError(where, what, "Write content, text, messages, or prompt and answer")


def read_shape(record: Record, form: str, folder: ImageFolder, where: str) -> Shaped:
    """Read the parts of a record of a form.

    Args:
        record: The record.
        form: What ``form_of`` found.
        folder: Where references to images start from.
        where: File and line, for errors.

    Raises:
        DataError: The record breaks its form.
    """
    return _READERS[form](record, form, folder, where)


def link_key(record: Record) -> str | None:
    """The key that holds a link to the web, as in the tables of LAION; None if none does."""
    found = (key for key in record if key.lower() in LINK_KEYS and isinstance(record[key], str))
    return next((key for key in found if is_link(record[key])), None)


def table_of_links(record: Record, key: str, where: str) -> UnusableDocument:
    """The error of a row that names a picture by a link which may not be followed."""
    path = where.rpartition(":")[0]
    kind = path.rpartition(".")[2].lower()
    caption = next((k for k in record if k.lower() in ("caption", "text", "alt_text")), "caption")
    what = f"names its picture by a link in the column {shown_key(key)}, which is not followed"
    remedy = "Download the pictures, and preprocess 'images/*.tar': img2dataset --url_list "
    remedy += f"{path} --input_format {kind} --url_col {shown_key(key)} --caption_col "
    remedy += f"{shown_key(caption)} --output_format webdataset --output_folder images"
    return UnusableDocument(where, what, remedy, TABLE_OF_LINKS)


def answer_key(record: Record, form: str) -> str | None:
    """The key of the answer to a record's prompt; None if it has none."""
    if form not in ("prompt", "question", "query", "instruction"):
        return None
    return next((key for key in ANSWER_KEYS if record.get(key) is not None), None)


def _read_content(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    unused: set[str] = set()
    parts = parse_content(record[key], folder, where, key, unused)
    if record.get("prompt") is None:
        return Shaped(parts, None, frozenset((key,)), frozenset(unused))
    # what `generate` and `annotate answer` write: the content is an answer, a document of its own
    return Shaped(parts, None, frozenset((key, "prompt")), frozenset((*unused, "prompt")))


def _read_text(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    value = record[key]
    if not isinstance(value, str):
        what = f"{key} must be a string, not {type(value).__name__}"
        raise DataError(where, what, "Write it as a string")
    return Shaped((TextPart(value.removeprefix("\ufeff")),), None, frozenset((key,)))


def _read_messages(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    return _conversation(record, record[key], {key}, folder, where)


def _read_prompt(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    prompt, used = record[key], {key}
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) and "role" in prompt[0]:
        messages, names = list(prompt), [f"{key}[{i}]" for i in range(len(prompt))]
    else:
        messages, names = [{"role": USER, "content": prompt}], [key]
    if (told := answer_key(record, key)) is not None:
        used.add(told)
        _append_answer(messages, names, record[told], told)
    return _conversation(record, messages, used, folder, where, names)


def _append_answer(messages: list[Any], names: list[str], answer: Any, key: str) -> None:
    if isinstance(answer, list) and answer and isinstance(answer[0], dict) and "role" in answer[0]:
        messages += answer
        names += [f"{key}[{i}]" for i in range(len(answer))]
        return
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    messages.append({"role": ASSISTANT, "content": str(answer) if is_number else answer})
    names.append(key)


def _read_instruction(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    used, messages, names = {key, "history"}, list[Any](), list[str]()
    history = record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    if not pairs:
        what = "history must be a list of pairs of a prompt and an answer"
        raise DataError(where, what, 'Write [["...", "..."]], or leave it out')
    for number, (asked, told) in enumerate(history):
        messages += [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": told}]
        names += [f"history[{number}]"] * 2
    text = record[key]
    context = next((k for k in _CONTEXT_KEYS if record.get(k)), None)
    if context is not None:
        used.add(context)
        if not isinstance(record[context], str) or not isinstance(text, str):
            what = f"{key} and {context} must be strings"
            raise DataError(where, what, "Write them as strings")
        text = f"{text}\n\n{record[context]}"
    messages.append({"role": USER, "content": text})
    names.append(key)
    if (told_key := answer_key(record, key)) is not None:
        used.add(told_key)
        _append_answer(messages, names, record[told_key], told_key)
    return _conversation(record, messages, used, folder, where, names)


def _conversation(
    record: Record,
    messages: Any,
    used: set[str],
    folder: ImageFolder,
    where: str,
    names: list[str] | None = None,
) -> Shaped:
    """A conversation; a system message in the key ``system`` stands first."""
    system = record.get("system")
    first = messages[0] if isinstance(messages, list) and messages else None
    has_own = isinstance(first, dict) and SYSTEM in (first.get("role"), first.get("from"))
    if isinstance(system, str) and system.strip() and isinstance(messages, list) and not has_own:
        messages = [{"role": SYSTEM, "content": system}, *messages]
        # without names, the errors count messages from the first one of the record
        names = ["system", *(names or [f"messages[{i}]" for i in range(len(messages) - 1)])]
        used = {*used, "system"}
    parts, roles, unused = parse_messages(messages, folder, where, tuple(names or ()))
    return Shaped(parts, roles, frozenset(used), frozenset(unused))


def _read_interleaved(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    texts = record.get("texts")
    texts = texts if isinstance(texts, list) else []
    if texts and all(isinstance(t, dict) and {"user", "assistant"} <= t.keys() for t in texts):
        messages = [
            {"role": role, "content": text[role]} for text in texts for role in (USER, ASSISTANT)
        ]
        names = [f"texts[{i}]" for i in range(len(texts)) for _ in (USER, ASSISTANT)]
        return _conversation(record, messages, {"texts"}, folder, where, names)
    parts = parse_parallel(record, folder, where)
    return Shaped(parts, None, frozenset(("images", "texts")))


def _read_text_list(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    parts = parse_text_list(record, folder, where)
    return Shaped(parts, None, frozenset((key, PICTURES_OF_TEXT_LIST)))


def _read_half_pair(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    """A whole pair is two records (``pairs.py``), so only half of one gets here."""
    what = f"has a {key} answer, but no rejected one"
    raise DataError(where, what, "Write both, or write the answer as messages")


@dataclass(frozen=True, slots=True)
class Form:
    """A form of records; the table of docs/data.md is made from these (``form_table``)."""

    key: str
    """The key that tells it."""
    name: str
    """Who writes it so, for people."""
    how: str
    """How it is read, for people; Markdown."""
    example: Record
    """A record of this form; ``0.png`` is a picture beside its file."""
    read: Callable[[Record, str, ImageFolder, str], Shaped]


_ASKED = {"role": "user", "content": "<image>Which digit?"}
_TOLD = {"role": "assistant", "content": "Zero."}

FORMS = (
    Form(
        "content",
        "our own",
        "text and image parts in order",
        {"content": [{"type": "text", "text": "A zero:"}, {"type": "image", "image": "0.png"}]},
        _read_content,
    ),
    Form(
        "text",
        "plain text; image and text columns",
        "one text; pictures beside it stand before it or at its marks",
        {"text": "A zero.", "image": "0.png"},
        _read_text,
    ),
    Form(
        "messages",
        "OpenAI, Hugging Face, LLaMA-Factory",
        "a conversation of `role` and `content`, which is a text or a list of parts (`text`, "
        "`image`, `image_url`); a part `image` without a picture takes the next one of `images`",
        {"messages": [_ASKED, _TOLD], "images": ["0.png"]},
        _read_messages,
    ),
    Form(
        "conversations",
        "ShareGPT, LLaVA",
        "a conversation of `from` and `value`",
        {
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>Which digit?"},
                {"from": "gpt", "value": "Zero."},
            ],
        },
        _read_messages,
    ),
    Form(
        "prompt",
        "our own, TRL",
        "with `answer`, `completion` or `response`: a conversation of two messages; each may be a "
        "text, parts, or a list of messages",
        {"prompt": "<image>Which digit?", "answer": "Zero.", "image": "0.png"},
        _read_prompt,
    ),
    Form(
        "question",
        "visual question answering",
        "as `prompt`",
        {"question": "Which digit?", "answer": "Zero.", "image": "0.png"},
        _read_prompt,
    ),
    Form(
        "query",
        "ms-swift",
        "as `prompt`",
        {"query": "<image>Which digit?", "response": "Zero.", "images": ["0.png"]},
        _read_prompt,
    ),
    Form(
        "instruction",
        "Alpaca",
        "with `output`, and `input` and `history` if they are there: a conversation",
        {"instruction": "Write it as a numeral.", "input": "three", "output": "3"},
        _read_instruction,
    ),
    Form(
        "texts",
        "OBELICS, The Cauldron",
        "the lists `images` and `texts`, of which one is null at each place; or texts that are "
        "objects with `user` and `assistant`, a conversation about the `images`",
        {"images": [None, "0.png"], "texts": ["A zero:", None]},
        _read_interleaved,
    ),
    Form(
        "text_list",
        "MMC4",
        "texts in order; each picture of `image_info` stands before the text that its "
        "`matched_text_index` names. `image_name` is its file",
        {
            "text_list": ["Digits.", "A zero."],
            "image_info": [{"image_name": "0.png", "matched_text_index": 1}],
        },
        _read_text_list,
    ),
    Form(
        "caption",
        "image and caption columns",
        "the caption of a picture in another key; the picture stands first",
        {"image": "0.png", "caption": "A zero."},
        _read_text,
    ),
    Form(
        "chosen",
        "TRL, LLaMA-Factory",
        "with `rejected`: two answers to the prompt in the other keys, for preference tuning",
        {"prompt": "Write 3 as a word.", "chosen": "three", "rejected": "3"},
        _read_half_pair,
    ),
)
"""In the order of ``FORM_KEYS``."""
_READERS = {form.key: form.read for form in FORMS}


def form_table() -> str:
    """The table of docs/data.md in Markdown: one row per form, with an example."""
    lines = ["| key | written by | how it is read | example |", "|---|---|---|---|"]
    for form in FORMS:
        example = json.dumps(form.example, ensure_ascii=False)
        lines.append(f"| `{form.key}` | {form.name} | {form.how} | `{example}` |")
    return "\n".join(lines) + "\n"
