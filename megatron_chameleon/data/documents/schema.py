"""Documents: text and images in reading order. Everything starts from them.

A record (a line of JSON, a parquet row, a tar sample) becomes one of three things, each by an entry
point of its own, because only the first may show an answer to the model:

- a document to train on (``records.document_of``)
- a prompt that the model continues (``records.prompt_of``)
- a question with the reference answers beside it (``questions.question_of``)

``shapes.py`` says which forms a record may have, ``pictures.py`` finds the pictures beside a text,
``image_part.py`` opens images, and ``parse.py`` reads whole inputs.
"""

from dataclasses import dataclass

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.errors import DataError


class UnusableDocument(DataError):
    """A document that is left out for a reason which is counted by itself.

    ``reason`` is a few words that are the same for all documents with this fault.
    """

    def __init__(self, where: str, what: str, remedy: str, reason: str) -> None:
        super().__init__(where, what, remedy)
        self.reason = reason


SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
"""The roles in a conversation."""
BEHIND_SYSTEM = "\n\n"
"""Text between a system message and its prompt."""


@dataclass(slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class PairPlaces:
    """Where the two conversations of a pair lie in the parts of its document."""

    rejected: int
    """The part with which the rejected conversation begins, after the chosen one."""
    shared: int
    """How many parts the two have in common at their beginning: the prompt."""


@dataclass(slots=True)
class Document:
    id: str
    corpus_name: str
    """The key ``source``, or the file's name up to its first dot."""
    content: tuple[TextPart | ImagePart, ...]
    where: str
    """The file and the line, key or row that it was read from."""
    roles: tuple[str, ...] | None = None
    """The speaker of each part of a conversation; None for other documents."""
    record: int = 0
    """Line, sample or row of its file, counted from 1."""
    unused_keys: tuple[str, ...] = ()
    """Keys of the record that hold a value and were not read."""
    pair: PairPlaces | None = None
    """For a pair of a chosen and a rejected answer (``pairs.py``), which is two conversations."""
