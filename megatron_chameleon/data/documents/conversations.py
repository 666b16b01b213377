"""Conversations, the documents of fine-tuning: turns of prompt and answer.

    <s> prompt <reserved08706> answer </s> prompt <reserved08706> answer </s>

Each prompt ends with the separator and each answer with ``</s>``, wherever it stands. Generation
stops at ``</s>``, so the model has one way to say that it has finished. Only answers are trained,
including their ``</s>``; prompts and the separators after them are not. A system message is part of
the first prompt: it stands before it, with a blank line in between.

Images in prompts are resized as a whole, with a border; images in answers are cropped.

Source: paper, section 3.2 (separator, loss on answers, padding); the reference's inference code,
which writes ``<s>``, the prompt and ``<END-OF-TURN>`` (the id of ``<reserved08706>``) and reads the
answer up to ``</s>`` (chameleon/inference/chameleon.py and vocab.py, ``eot_id`` and ``eos_id``).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import ASSISTANT, Document, TextPart


@dataclass(frozen=True)
class Turn:
    """A part of a document that is followed by a separator or ``</s>``."""

    parts: tuple[TextPart | ImagePart, ...]
    is_prompt: bool = False
    """Whether it ends with the separator; other turns end with ``</s>``."""
    is_answer: bool = False
    """Whether the loss is on this turn and not on prompts. False if the document is not a
    conversation."""
    begins: bool = True
    """Whether it is the first turn, before which ``<s>`` stands."""


def turns_of(document: Document) -> Iterator[Turn]:
    """Prompts and answers in order; a document that is not a conversation is one turn.

    Of a pair, the turns of the chosen conversation come first, and the loss is only on the answers
    in which the two differ.
    """
    if document.roles is None:
        yield Turn(document.content)
        return
    place, pair = 0, document.pair
    for is_answer, roles in itertools.groupby(document.roles, lambda role: role == ASSISTANT):
        stop = place + sum(1 for _ in roles)
        begin = 0 if pair is None or place < pair.rejected else pair.rejected
        in_loss = is_answer and (pair is None or place - begin >= pair.shared)
        yield Turn(document.content[place:stop], not is_answer, in_loss, place == begin)
        place = stop


def fault_of(document: Document) -> str:
    """Why a conversation with valid messages cannot be trained on; empty if it can."""
    if document.roles is None or document.roles[-1] == ASSISTANT:
        return ""
    if ASSISTANT not in document.roles:
        return "the conversation has no assistant message"
    return f"the conversation ends with a {document.roles[-1]} message that has no answer"


def are_padded(document: Document, fit: str) -> list[bool]:
    """For each image of a document, whether it is padded to a square instead of cropped.

    Args:
        document: With or without roles.
        fit: One of ``images.fit.IMAGE_FITS``.
    """
    roles = document.roles or (ASSISTANT,) * len(document.content)
    return [
        fit == "pad" or (fit == "role" and role != ASSISTANT)
        for part, role in zip(document.content, roles, strict=True)
        if isinstance(part, ImagePart)
    ]
