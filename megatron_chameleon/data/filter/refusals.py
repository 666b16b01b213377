"""Refusals of unsafe prompts, as conversations to train on: the paper's category "safety".

The answers come from templates of our own: a beginning, sometimes a reason, sometimes an offer.
Which ones a prompt gets follows from the seed, its id and its text alone, so the order and the
number of prompts do not change the others' answers.

Source: paper, section 3.1: prompts that may provoke unsafe content, each with a refusal, also
of prompts with pictures.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.parse import read_documents
from megatron_chameleon.data.documents.records import Origin, prompt_of
from megatron_chameleon.data.documents.schema import ASSISTANT, USER, Document, TextPart
from megatron_chameleon.data.filter.lines import ImageNamer, ImagePlaces, line_of
from megatron_chameleon.data.filter.write import beside, remove_old_copies, suffix_of_output
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.files import read_text, replace_file
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.outputs import check_name, check_output, check_output_folder

LONGEST_TOPIC = 80
"""Characters; a longer topic is not named."""

_SHORT = (
    "I can't help with that.",
    "Sorry, I won't do that.",
    "No, I can't help with this.",
    "I have to say no to this one.",
    "That is not something I will do.",
    "I'm not able to help with this.",
)
_BEGINNINGS = (
    "I'm sorry, but I can't help with that.",
    "I won't help with this request.",
    "I understand that you are asking, but I can't do this.",
    "Thank you for asking, but I have to decline.",
    "I'd rather not answer this.",
    "This is a request that I have to turn down.",
)
_ABOUT_TOPIC = (
    "I'm sorry, but I can't help with {topic}.",
    "I don't give help with {topic}.",
    "{Topic} is a subject on which I can't assist.",
    "I have to decline requests about {topic}.",
)
_DRAWINGS = (
    "I'm sorry, but I can't draw that.",
    "I won't make a picture of this.",
    "This is not a picture that I will create.",
    "I have to decline this drawing.",
    "I can't create that image.",
)
_DRAWINGS_OF_TOPIC = (
    "I don't make pictures of {topic}.",
    "I'm sorry, but I can't draw {topic}.",
    "I have to decline drawings of {topic}.",
)
_PICTURES = (
    "I'm sorry, but I can't help with this request about the picture.",
    "I won't answer this about the picture.",
    "I have looked at the picture, but I can't do what you ask.",
)
_REASONS = (
    "It could hurt someone.",
    "The result might put people at risk.",
    "It could be used to do harm.",
    "I don't want anyone to be harmed by my answer.",
    "It would not be safe.",
)
_OFFERS = (
    "If there is something else, I'm glad to help.",
    "I can help with another question.",
    "If you tell me what you want to achieve, I may know a safe way.",
    "If you or someone else is in danger, please call your local emergency number.",
    "Let me know if I can do something else for you.",
)
_DRAWING_OFFERS = (
    "I can draw something else for you.",
    "If you like, describe another picture.",
    "I'm glad to try another subject.",
)
_ASKS_FOR_PICTURE = re.compile(
    r"\b(draw|paint|sketch|illustrate|render|depict)\b"
    r"|\b(make|create|generate|produce|design|show|give)\b[^.?!]{0,40}"
    r"\b(image|picture|photo\w*|drawing|painting|illustration|poster|logo|cartoon|meme)s?\b",
    re.IGNORECASE,
)


@dataclass
class Refusals:
    """What was written."""

    prompts: int = 0
    pairs: int = 0
    drawings: int = 0
    """Prompts that ask for a picture."""


@dataclass(frozen=True)
class _Prompt:
    document: Document
    topic: str


def write_refusals(
    inputs: Sequence[str], output: str, seed: int, answers: int, images: ImageOptions
) -> Refusals:
    """Write conversations in which unsafe prompts are refused.

    Args:
        inputs: ``.txt`` files with a prompt per line, or files of documents.
        output: A ``.jsonl`` file.
        seed: Of the choice of answers.
        answers: Different refusals of each prompt.
        images: Where pictures of prompts may lie.

    Raises:
        ConfigError: The output has another suffix.
        DataError: A prompt cannot be read, or there is none.
    """
    check_name("--output", output, ConfigError)
    suffix_of_output(output)
    check_output("--output", output, inputs)
    copies = beside(output, "-images")
    check_output_folder("--output", copies)
    namer = ImageNamer(ImagePlaces(output, str(copies)))
    found = Refusals()
    with replace_file(output) as file:
        for prompt in _prompts(inputs, images):
            document = prompt.document
            found.prompts += 1
            found.drawings += asks_for_picture(_text(document))
            for number, answer in enumerate(refusals_of(document, prompt.topic, seed, answers)):
                name = document.id if answers == 1 else f"{document.id}-{number}"
                content = (*document.content, TextPart(answer))
                roles = (*(document.roles or ()), ASSISTANT)
                pair = replace(document, id=name, content=content, roles=roles)
                file.write(line_of(pair, {}, namer.name))
                found.pairs += 1
        if not found.prompts:
            raise DataError(inputs[0], "has no prompt", "Write one prompt per line")
    remove_old_copies(copies, namer.copied)
    return found


def asks_for_picture(text: str) -> bool:
    """Whether a prompt asks for a picture.

    >>> asks_for_picture("Draw a bomb"), asks_for_picture("How do I draw up a will?")
    (True, True)
    """
    return _ASKS_FOR_PICTURE.search(text) is not None


def refusals_of(document: Document, topic: str, seed: int, count: int) -> list[str]:
    """Different refusals of a prompt, fewer than ``count`` if the templates have no more.

    Args:
        document: The prompt, a conversation that ends with the user.
        topic: What it is about, such as "making explosives"; empty if not known.
        seed: Of the choice.
        count: How many.
    """
    text = _text(document)
    key = f"{seed}\0{document.id}\0{text}".encode("utf-8", "surrogatepass")
    draw = random.Random(hashlib.sha256(key).digest())
    found: dict[str, None] = {}
    for _ in range(20 * count):
        found.setdefault(_refusal(document, text, topic, draw))
        if len(found) == count:
            break
    return list(found)


def _refusal(document: Document, text: str, topic: str, draw: random.Random) -> str:
    is_drawing = asks_for_picture(text)
    if draw.random() < 0.2:
        return draw.choice(_SHORT)
    beginnings: tuple[str, ...] = _DRAWINGS if is_drawing else _BEGINNINGS
    if not is_drawing and any(isinstance(part, ImagePart) for part in document.content):
        beginnings = (*_BEGINNINGS, *_PICTURES)
    if topic and len(topic) <= LONGEST_TOPIC and draw.random() < 0.6:
        beginnings = _DRAWINGS_OF_TOPIC if is_drawing else _ABOUT_TOPIC
    words = {"topic": topic, "Topic": topic[:1].upper() + topic[1:]}
    sentences = [draw.choice(beginnings).format(**words)]
    if draw.random() < 0.5:
        sentences.append(draw.choice(_REASONS))
    if draw.random() < 0.5:
        sentences.append(draw.choice(_DRAWING_OFFERS if is_drawing else _OFFERS))
    return " ".join(sentences)


def _text(document: Document) -> str:
    return " ".join(part.text for part in document.content if isinstance(part, TextPart))


def _prompts(inputs: Sequence[str], images: ImageOptions) -> Iterator[_Prompt]:
    for path in inputs:
        if path.lower().endswith(".txt"):
            yield from _lines(path)
            continue
        find_inputs([path])  # an unknown suffix is said before anything is read
        topics: list[Any] = []

        def make(record: Any, origin: Origin, own: Any = None, seen: Any = topics) -> Document:
            topic = record.get("topic")
            seen.append(topic if isinstance(topic, str) else "")
            return prompt_of(record, origin, own)

        for document in read_documents([path], make, images):
            topic = " ".join(topics.pop().split()).rstrip(".?!")
            topics.clear()
            if document.roles is None:
                document.roles = (USER,) * len(document.content)
            _check(document)
            yield _Prompt(document, topic)


def _lines(path: str) -> Iterator[_Prompt]:
    name = Path(path).name
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text = line.removeprefix("\ufeff").strip()
        if text:
            parts = (TextPart(text),)
            where, source = f"{path}:{number}", name.split(".")[0]
            yield _Prompt(Document(f"{name}:{number}", source, parts, where, (USER,)), "")


def _check(document: Document) -> None:
    """Refuse a prompt with nothing in it."""
    if not any(isinstance(p, ImagePart) or p.text.strip() for p in document.content):
        raise DataError(document.where, "the prompt is empty", "Write text, or remove it")
