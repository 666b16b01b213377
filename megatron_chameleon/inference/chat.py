"""Prompts of conversations, encoded as fine-tuning has seen them.

    session.generate([chat_prompt(document, session.tokenizer)])

``<s>`` and the turns so far; the answer is what follows the last separator. See
``data/documents/conversations.py`` for the format.
"""

from dataclasses import dataclass

from PIL import Image

from megatron_chameleon.data.documents.conversations import turns_of
from megatron_chameleon.data.documents.schema import USER, Document, ImagePart, TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import prepare_image


@dataclass(frozen=True)
class ControlToken:
    """A token that text cannot spell, as a part of a prompt."""

    token_id: int


ChatPart = TextPart | ImagePart | Image.Image | ControlToken


def chat_prompt(document: Document, tokenizer: Tokenizer) -> list[ChatPart]:
    """The parts of a conversation up to the answer that is asked for.

    Args:
        document: With roles, the last of them the user's; without, all of it is one user's message.
        tokenizer: The model's.

    Raises:
        DataError: The last message is not the user's, or an image cannot be read.
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
        raise DataError(document.where, "nothing is asked", "Give a prompt, an image or both")
    if document.roles[-1] != USER:
        what = f"the last message is of the {document.roles[-1]}, so that nothing is asked"
        raise DataError(document.where, what, "End with a message of the user")
    vocabulary, parts = tokenizer.vocabulary, list[ChatPart]()
    for turn in turns_of(document):
        parts += [_padded(part, tokenizer) if turn.is_prompt else part for part in turn.parts]
        parts.append(ControlToken(vocabulary.separator if turn.is_prompt else vocabulary.eos))
    return parts


def _padded(part: TextPart | ImagePart, tokenizer: Tokenizer) -> ChatPart:
    """An image of a prompt with its border; it has the tokenizer's size, which no one crops."""
    if isinstance(part, TextPart) or tokenizer.image is None:
        return part
    return Image.fromarray(prepare_image(part.open(), tokenizer.image.resolution, pad=True))
