"""Conversations: what fine-tuning trains on, as turns of prompt and answer.

    <s> prompt <reserved08706> answer </s> prompt <reserved08706> answer </s>

Each prompt ends with the separator, each answer with ``</s>``, the last one of several too: whoever
generates stops there, and the model has one way to say that it has finished. Only answers are
trained, their ``</s>`` included; prompts and the separators behind them are not. A system message
stands before the first prompt, with a blank line between, and is a part of it.

Images of prompts are resized whole, with a border, and images of answers are cropped.

Source: paper, section 3.2 (separator, loss on answers, padding); the reference's inference code,
which writes ``<s>``, the prompt and ``<END-OF-TURN>`` (the id of ``<reserved08706>``) and reads the
answer up to ``</s>`` (chameleon/inference/chameleon.py and vocab.py, ``eot_id`` and ``eos_id``).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.data.documents.schema import ASSISTANT, Document, ImagePart, TextPart

IMAGE_FITS = ("role", "crop", "pad")
"""How images become square. ``role``: padded in prompts, cropped elsewhere; or all alike."""


@dataclass(frozen=True)
class Turn:
    """A part of a document that ends with a token of its own."""

    parts: tuple[TextPart | ImagePart, ...]
    is_prompt: bool = False
    """It ends with the separator; else with ``</s>``."""
    is_answer: bool = False
    """It is trained, and prompts are not. False for documents that are no conversation."""


def turns_of(document: Document) -> Iterator[Turn]:
    """Prompts and answers in order; a document that is no conversation is one turn."""
    if document.roles is None:
        yield Turn(document.content)
        return
    place = 0
    for is_answer, roles in itertools.groupby(document.roles, lambda role: role == ASSISTANT):
        stop = place + sum(1 for _ in roles)
        yield Turn(document.content[place:stop], not is_answer, is_answer)
        place = stop


def fault_of(document: Document) -> str:
    """Why a conversation cannot be trained, its messages being in order; empty if it can."""
    if document.roles is None or document.roles[-1] == ASSISTANT:
        return ""
    if ASSISTANT not in document.roles:
        return "the conversation has no answer of the assistant"
    return f"the conversation ends with the {document.roles[-1]}, which nobody answers"


def are_padded(document: Document, fit: str) -> list[bool]:
    """Of each image of a document, whether it is padded to a square and not cropped.

    Args:
        document: With or without roles.
        fit: One of ``IMAGE_FITS``.
    """
    roles = document.roles or (ASSISTANT,) * len(document.content)
    return [
        fit == "pad" or (fit == "role" and role != ASSISTANT)
        for part, role in zip(document.content, roles, strict=True)
        if isinstance(part, ImagePart)
    ]
