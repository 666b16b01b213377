"""The forms that a record may have. Each is known by one of its keys:

    content                     parts in order: {"content": [{"type": "text", ...}, ...]}
    text                        {"text": "..."}
    messages                    a conversation, as OpenAI and Hugging Face write it
    conversations               a conversation, as ShareGPT and LLaVA write it
    prompt (with answer)        a conversation of two messages; also question and answer, and
                                prompt and completion or response
    instruction (with output)   a conversation, as Alpaca writes it, with input and history
    images and texts            OBELICS: parallel lists; one of the two is null at each place.
                                The Cauldron: texts are objects with user and assistant
    caption                     the caption of a picture in another key
    chosen and rejected         two answers to the prompt in the other keys (``pairs.py``)

A record has one of the first four keys, or else it is of the first of the others that it has. To
add a form, write a function and a line in ``_READERS``, and its key in ``inputs/form_keys.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.data.documents.messages import parse_content, parse_messages
from megatron_chameleon.data.documents.pictures import Part, read_picture, shown_key
from megatron_chameleon.data.documents.schema import ASSISTANT, SYSTEM, USER, TextPart
from megatron_chameleon.data.inputs.form_keys import FIRST_FORM_KEYS, OTHER_FORM_KEYS
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.references import ImageFolder

Record = Mapping[str, Any]

ANSWER_KEYS = ("answer", "completion", "response", "output")
"""The keys of the answer to a prompt; the first one with a value counts."""
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


def answer_key(record: Record, form: str) -> str | None:
    """The key of the answer to a record's prompt; None if it has none."""
    if form not in ("prompt", "question", "instruction"):
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
    images, texts = record.get("images") or [], record.get("texts") or []
    if not isinstance(images, list) or not isinstance(texts, list):
        what = "images and texts must be lists"
        raise DataError(
            where, what, "Write two list columns; at each place one of the two must be null"
        )
    if texts and all(isinstance(t, dict) and {"user", "assistant"} <= t.keys() for t in texts):
        messages = [
            {"role": role, "content": text[role]} for text in texts for role in (USER, ASSISTANT)
        ]
        names = [f"texts[{i}]" for i in range(len(texts)) for _ in (USER, ASSISTANT)]
        return _conversation(record, messages, {"texts"}, folder, where, names)
    if len(images) != len(texts) or not images:
        what = f"images has {len(images)} entries, but texts has {len(texts)}"
        raise DataError(where, what, "Write two lists of the same length, at least 1")
    pairs = enumerate(zip(images, texts, strict=True))
    parts = tuple(_interleaved_part(i, image, text, folder, where) for i, (image, text) in pairs)
    return Shaped(parts, None, frozenset(("images", "texts")))


def _interleaved_part(
    position: int, image: Any, text: Any, folder: ImageFolder, where: str
) -> Part:
    if (image is None) == (text is None):
        both = "both null" if image is None else "both set"
        what = f"images[{position}] and texts[{position}] are {both}"
        raise DataError(where, what, "Set exactly one of the two at each place")
    if text is None:
        if not isinstance(image, str | bytes | dict):
            what = f"images[{position}] must be a path or bytes, not {type(image).__name__}"
            raise DataError(where, what, "Write paths or bytes into the list")
        return read_picture(image, f"images[{position}]", folder, where)
    if not isinstance(text, str):
        what = f"texts[{position}] must be a string, not {type(text).__name__}"
        raise DataError(where, what, "Write strings into the list")
    return TextPart(text.removeprefix("\ufeff"))


def _read_half_pair(record: Record, key: str, folder: ImageFolder, where: str) -> Shaped:
    """A whole pair is two records (``pairs.py``), so only half of one gets here."""
    what = f"has a {key} answer, but no rejected one"
    raise DataError(where, what, "Write both, or write the answer as messages")


_READERS: Mapping[str, Callable[[Record, str, ImageFolder, str], Shaped]] = {
    "content": _read_content,
    "text": _read_text,
    "messages": _read_messages,
    "conversations": _read_messages,
    "prompt": _read_prompt,
    "question": _read_prompt,
    "instruction": _read_instruction,
    "texts": _read_interleaved,
    "caption": _read_text,
    "chosen": _read_half_pair,
}
