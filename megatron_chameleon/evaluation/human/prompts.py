"""Answers a file of prompts in text and images, for people to judge."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from PIL import Image

from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.asking.record_files import read_records
from megatron_chameleon.evaluation.human.questionnaire import data_uri, part_json
from megatron_chameleon.files import write_text

if TYPE_CHECKING:
    from megatron_chameleon.inference.decode import GenerationOptions
    from megatron_chameleon.inference.session import Answer

ANSWERED_FILE = "documents.jsonl"
KEPT = ("category", "modality")
"""Optional keys of a prompt that its answer repeats."""


def read_prompts(path: Path) -> list[tuple[Document, dict[str, str]]]:
    """The prompts of a file, each with its category and modality if it has them.

    Raises:
        DataError: The file cannot be read, or an id occurs twice.
    """
    prompts = []
    seen: set[str] = set()
    for number, record in enumerate(read_records(path), start=1):
        document = parse_line(orjson.dumps(record), path, number)
        if document.id in seen:
            remedy = "Give each prompt its own id"
            raise DataError(document.where, f"the id {document.id} occurs twice", remedy)
        seen.add(document.id)
        about = {key: str(record[key]) for key in KEPT if record.get(key)}
        prompts.append((document, about))
    return prompts


def answer_prompts(
    asker: Asker, path: Path, output: Path, options: "GenerationOptions", limit: int | None = None
) -> Path:
    """Answer every prompt. Prompts that already have an answer are not asked again.

    Args:
        asker: The model and its stored answers.
        path: A file of documents; the content of each is the prompt.
        output: The folder to write to.
        options: How to generate.
        limit: Answer only so many prompts, from the first one on; None answers all.

    Returns:
        The file of answers, which ``annotate prepare`` reads.

    Raises:
        DataError: The file or an image cannot be read, or a prompt does not fit the context.
    """
    prompts = read_prompts(path)[:limit]
    answers = asker.answer([document.content for document, _ in prompts], options, _keep)
    lines = [
        {
            "id": document.id,
            "source": "chameleon annotate",
            **about,
            "prompt": [part_json(part) for part in document.content],
            "content": content,
        }
        for (document, about), content in zip(prompts, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(output / ANSWERED_FILE, text)
    return output / ANSWERED_FILE


def _keep(answer: "Answer") -> list[Any]:
    return [
        {"type": "image", "image": data_uri(part)}
        if isinstance(part, Image.Image)
        else {"type": "text", "text": part}
        for part in answer.content
    ]
