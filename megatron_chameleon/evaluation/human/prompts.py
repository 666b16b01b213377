"""Answers a file of prompts in text and images, for people to judge."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from megatron_chameleon.data.documents.conversations import turns_of
from megatron_chameleon.data.documents.records import Origin, prompt_of
from megatron_chameleon.data.documents.schema import USER, Document
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.asking.record_files import read_records
from megatron_chameleon.evaluation.human.questionnaire import data_uri, part_json
from megatron_chameleon.files import write_text
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.inference.chat import parts_of

if TYPE_CHECKING:
    from megatron_chameleon.inference.answers.answer import Answer
    from megatron_chameleon.inference.engine.options import GenerationOptions

ANSWERED_FILE = "documents.jsonl"
KEPT = ("category", "modality")
"""Optional keys of a prompt that its answer repeats."""

Prompt = tuple[Document, dict[str, str]]
"""A prompt, and its category and modality if it has them."""


def read_prompts(path: Path, images: ImageOptions | None = None) -> list[Prompt]:
    """The prompts of a file; an answer at the end of a conversation is left out.

    Args:
        path: The file.
        images: Where images may lie, and how they are read.

    Raises:
        DataError: The file cannot be read, or an id occurs twice.
    """
    prompts = []
    seen: set[str] = set()
    for number, record in enumerate(read_records(path), start=1):
        document = prompt_of(record, Origin(str(path), number, images=images or ImageOptions()))
        if document.id in seen:
            remedy = "Give each prompt its own id"
            raise DataError(document.where, f"the id {document.id} occurs twice", remedy)
        seen.add(document.id)
        about = {key: str(record[key]) for key in KEPT if record.get(key)}
        prompts.append((document, about))
    return prompts


def answer_prompts(
    asker: Asker,
    prompts: list[Prompt],
    output: Path,
    options: "GenerationOptions",
    chat: bool = False,
) -> Path:
    """Answer every prompt. Prompts that already have an answer are not asked again.

    Args:
        asker: The model and its stored answers.
        prompts: What ``read_prompts`` returns.
        output: The folder to write to.
        options: How to generate.
        chat: Whether all prompts take the form of conversations in fine-tuning. Prompts that are
            written as conversations always do.

    Returns:
        The file of answers, which ``annotate prepare`` reads.

    Raises:
        DataError: An image or the disk cannot be used, or a prompt does not fit the context.
    """
    tokenizer = asker.session.tokenizer
    asked = [parts_of(document, tokenizer, is_chat=chat) for document, _ in prompts]
    answers = asker.answer(asked, options, _keep)
    lines = [
        {
            "id": document.id,
            "source": "chameleon annotate",
            **about,
            "prompt": _shown(document),
            "content": content,
        }
        for (document, about), content in zip(prompts, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(output / ANSWERED_FILE, text)
    return output / ANSWERED_FILE


def _shown(document: Document) -> list[dict[str, str]]:
    """The parts of a prompt; those of a longer conversation stand under the speakers' names."""
    if not set(document.roles or ()) - {USER}:
        return [part_json(part) for part in document.content]
    parts: list[dict[str, str]] = []
    for turn in turns_of(document):
        name = "Assistant" if turn.is_answer else "User"
        parts.append({"type": "text", "text": f"{name}:\n" if not parts else f"\n\n{name}:\n"})
        parts += [part_json(part) for part in turn.parts]
    return parts


def _keep(answer: "Answer") -> list[Any]:
    return [
        {"type": "image", "image": data_uri(part)}
        if isinstance(part, Image.Image)
        else {"type": "text", "text": part}
        for part in answer.content
    ]
