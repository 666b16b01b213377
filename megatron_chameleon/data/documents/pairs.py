"""Pairs of a preferred and another answer to one prompt, the documents of preference tuning.

    {"prompt": "...", "chosen": "...", "rejected": "..."}       TRL, with a prompt of its own
    {"chosen": [messages], "rejected": [messages]}              TRL, the prompt is what they share
    {"conversations": [...], "chosen": {...}, "rejected": {...}}  LLaMA-Factory

The prompt may have any form of a conversation (``shapes.py``). An answer is a text, parts, a
picture, a message, or messages; messages that begin with the prompt are the whole conversation.
Each answer with the prompt before it is read as a conversation of its own. The two become one
document, so that whatever drops, holds out, shuffles or packs documents treats both alike.
"""

from collections.abc import Mapping
from typing import Any

from megatron_chameleon.data.documents.schema import ASSISTANT, Document, PairPlaces
from megatron_chameleon.errors import DataError

Record = Mapping[str, Any]

CHOSEN, REJECTED = "chosen", "rejected"
_PROMPT_LISTS = ("messages", "conversations")
_PROMPT_KEYS = ("prompt", "question", "query", "instruction")
_ROLE_KEYS = ("role", "from")
_ANSWERING = (ASSISTANT, "gpt", "chatgpt", "model")
_FIX = "Write a prompt, and chosen and rejected as two answers to it"


def is_pair(record: Record) -> bool:
    """Whether a record holds two answers, of which one is preferred."""
    return record.get(CHOSEN) is not None and record.get(REJECTED) is not None


def split_pair(record: Record, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of the two conversations of a pair, the chosen one first.

    Args:
        record: For which ``is_pair`` holds.
        where: File and line, for errors.

    Raises:
        DataError: An answer is not one, or there is no prompt.
    """
    first, second = (_conversation(record, key, where) for key in (CHOSEN, REJECTED))
    return first, second


def join_pair(chosen: Document, rejected: Document) -> Document:
    """One document of the two conversations of a pair.

    Raises:
        DataError: They are not two different answers to one prompt.
    """
    where = chosen.where
    for name, side in ((CHOSEN, chosen), (REJECTED, rejected)):
        if not side.roles or side.roles[-1] != ASSISTANT:
            raise DataError(where, f"{name} does not end with an answer of the assistant", _FIX)
    assert chosen.roles is not None and rejected.roles is not None
    parts = [list(zip(s.content, s.roles or (), strict=True)) for s in (chosen, rejected)]
    shared = 0
    for one, other in zip(*parts, strict=False):
        if one != other:
            break
        shared += 1
    if shared == len(parts[0]) == len(parts[1]):
        raise DataError(where, "chosen and rejected are the same answer", "Leave the pair out")
    both = (chosen.roles, rejected.roles)
    differs_in_answer = any(roles[shared : shared + 1] == (ASSISTANT,) for roles in both)
    # An answer may begin with the same picture or text as the other: it differs as a whole.
    shared = min(_turn_start(roles, shared) for roles in both)
    if not differs_in_answer or any(roles[shared] != ASSISTANT for roles in both):
        raise DataError(where, "chosen and rejected answer different prompts", _FIX)
    return Document(
        chosen.id,
        chosen.corpus_name,
        (*chosen.content, *rejected.content),
        where,
        (*chosen.roles, *rejected.roles),
        chosen.record,
        tuple(dict.fromkeys((*chosen.unused_keys, *rejected.unused_keys))),
        PairPlaces(len(chosen.content), shared),
    )


def _turn_start(roles: tuple[str, ...], place: int) -> int:
    """The first part of the assistant's turn that holds a part, or ends before it."""
    place = min(place, len(roles) - 1)
    if roles[place] != ASSISTANT and place and roles[place - 1] == ASSISTANT:
        place -= 1  # one answer goes on where the other conversation has a new message
    while place and roles[place] == roles[place - 1] == ASSISTANT:
        place -= 1
    return place


def _conversation(record: Record, key: str, where: str) -> dict[str, Any]:
    """The record of one of the two conversations."""
    own = {k: v for k, v in record.items() if k not in (CHOSEN, REJECTED)}
    answer = _messages(record[key], key, where)
    if not _answers(answer[0]):
        return _whole(own, answer, key, where)
    for name in _PROMPT_LISTS:
        if own.get(name) is not None:
            if not isinstance(own[name], list):
                raise DataError(where, f"{name} must be a list of messages", _FIX)
            return {**own, name: [*own[name], *answer]}
    if all(own.get(name) is None for name in _PROMPT_KEYS):
        raise DataError(where, "has chosen and rejected answers, but no prompt", _FIX)
    told = {k: v for k, v in own.items() if k not in ("answer", "completion", "response", "output")}
    return {**told, "answer": answer}


def _messages(value: Any, key: str, where: str) -> list[Any]:
    """An answer as messages; ``value`` is what the key of the record holds."""
    if isinstance(value, dict) and any(value.get(k) is not None for k in _ROLE_KEYS):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if any(value[0].get(k) is not None for k in _ROLE_KEYS):
            return value
    elif isinstance(value, dict | bytes):
        value = [{"type": "image", "image": value}]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    elif not isinstance(value, str):
        what = f"{key} must be a text, parts or messages, not {_kind(value)}"
        raise DataError(where, what, _FIX)
    return [{"role": ASSISTANT, "content": value}]


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _answers(message: Any) -> bool:
    told = next((message[k] for k in _ROLE_KEYS if message.get(k) is not None), None)
    return isinstance(told, str) and told.lower() in _ANSWERING


def _whole(own: dict[str, Any], answer: list[Any], key: str, where: str) -> dict[str, Any]:
    """A record of a whole conversation, which may say its prompt a second time."""
    prompt = next((own[k] for k in (*_PROMPT_LISTS, *_PROMPT_KEYS) if own.get(k) is not None), None)
    if isinstance(prompt, list):
        if answer[: len(prompt)] != prompt:
            what = f"the conversation in {key} does not begin with the messages of the prompt"
            raise DataError(where, what, "Write the prompt once")
    elif isinstance(prompt, str) and prompt.strip():
        texts = (m.get("content", m.get("value")) for m in answer if isinstance(m, dict))
        if not any(isinstance(text, str) and prompt.strip() in text for text in texts):
            what = f"the conversation in {key} does not hold the text of the prompt"
            raise DataError(where, what, "Write the prompt once")
    named = {*_PROMPT_LISTS, *_PROMPT_KEYS}
    return {**{k: v for k, v in own.items() if k not in named}, "messages": answer}
