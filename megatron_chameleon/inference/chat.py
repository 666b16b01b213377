"""Turn conversations into prompts, in the form that the model knows from its training.

    session.generate([prompt_of(document, session.tokenizer, session.prompt_format)])

For a model that was trained on conversations, a prompt is ``<s>`` and the turns so far, and the
answer follows the last separator (``data/documents/conversations.py``). Any other model has never
seen a separator. It gets what was said as the beginning of a document, and goes on from there.
"""

from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
from PIL import Image

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.data.documents.conversations import turns_of
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import USER, Document, TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer


class PromptFormat(StrEnum):
    """What a model takes a prompt for."""

    CHAT = "chat"
    """The turns of a conversation, each with its end; the model gives the next answer."""
    DOCUMENT = "document"
    """The beginning of a document; the model writes the rest."""


def prompt_format(reader: CheckpointReader) -> PromptFormat:
    """The form of the prompts of a model.

    It is a document's if the files don't say that the model was trained on conversations.
    """
    return PromptFormat.CHAT if reader.conversations else PromptFormat.DOCUMENT


@dataclass(frozen=True)
class ControlToken:
    """A part of a prompt: a token that text cannot spell."""

    token_id: int


@dataclass(slots=True)
class PaddedImage(ImagePart):
    """An image of a prompt: it is padded to its grid when it is opened, so nothing is cropped."""

    tokenizer: ImageTokenizer | None = field(default=None, compare=False, repr=False)
    """Whose grids they are."""

    def open(self) -> Image.Image:
        # not super(): a dataclass with slots is another class than the one that is written here
        image = ImagePart.open(self)
        assert self.tokenizer is not None
        return Image.fromarray(self.tokenizer.prepare(image, pad=True)[1])


@dataclass(slots=True)
class EncodedImage(ImagePart):
    """An image whose codes are known, so that each further prompt has the same ones."""

    codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)
    """int64, all codes of the image in raster order."""
    grid: Grid | None = None
    """Its rows and columns; None for a square."""


ChatPart = TextPart | ImagePart | Image.Image | ControlToken


def prompt_of(document: Document, tokenizer: Tokenizer, form: PromptFormat) -> list[ChatPart]:
    """The parts of a prompt in one of the two forms.

    Args:
        document: As for ``chat_prompt``.
        tokenizer: The model's tokenizer.
        form: In the form of a document, the messages follow one another with nothing in between,
            and images are cropped as in documents.

    Raises:
        DataError: As ``chat_prompt`` does.
    """
    parts = chat_prompt(document, tokenizer)
    return parts if form is PromptFormat.CHAT else list(document.content)


def parts_of(document: Document, tokenizer: Tokenizer, *, is_chat: bool) -> list[ChatPart]:
    """The parts of a prompt that somebody wrote as a document.

    Args:
        document: A conversation is asked as one; any other document is continued as it is.
        tokenizer: The model's tokenizer.
        is_chat: Whether a document without roles is one message of the user instead.

    Raises:
        DataError: As ``chat_prompt`` does.
    """
    if is_chat or document.roles:
        return chat_prompt(document, tokenizer)
    return list(document.content)


def chat_prompt(document: Document, tokenizer: Tokenizer) -> list[ChatPart]:
    """The parts of a conversation up to the answer that the model should give.

    Args:
        document: A conversation that ends with a message of the user. A document without roles is
            taken as one message of the user.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: There is no message, or the last one is not the user's.
    """
    if document.roles is None:
        document = Document(
            document.id,
            document.corpus_name,
            document.content,
            document.where,
            (USER,) * len(document.content),
        )
    assert document.roles is not None
    if not document.roles:
        raise DataError(document.where, "no prompt given", "Give a text, an image or both")
    if document.roles[-1] != USER:
        what = f"the last message is the {document.roles[-1]}'s, so there is nothing to answer"
        raise DataError(document.where, what, "End with a message of the user")
    vocabulary, parts = tokenizer.vocabulary, list[ChatPart]()
    for turn in turns_of(document):
        parts += [_padded(part, tokenizer) if turn.is_prompt else part for part in turn.parts]
        parts.append(ControlToken(vocabulary.separator if turn.is_prompt else vocabulary.eos))
    return parts


def _padded(part: TextPart | ImagePart, tokenizer: Tokenizer) -> ChatPart:
    """The part; an image is padded to its grid."""
    if isinstance(part, TextPart | EncodedImage) or tokenizer.image is None:
        return part
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    return PaddedImage(**values, tokenizer=tokenizer.image)
