"""The texts and images that a model wrote during training: ``samples/step_00001000/``."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import STEP_FOLDER, step_of
from megatron_chameleon.errors import DataError
from megatron_chameleon.runs.lines import BrokenLines, read_objects

FOLDER = "samples"
SAMPLES_FILE = "samples.jsonl"
MOST_ANSWERS = 200
"""Of one step; a config has a few prompts."""
_LONGEST_TEXT = 20_000


@dataclass(frozen=True)
class SamplePart:
    """A text or an image of an answer."""

    text: str
    image: Path | None
    """A file in the folder of the step; None for a text. Nobody has checked that it is an image."""


@dataclass(frozen=True)
class SampleAnswer:
    """What the model answered to one prompt."""

    prompt: str
    """In words: the name of its image, its text, and what was forced."""
    parts: list[SamplePart]


def list_samples(run: Path) -> list[Path]:
    """The folders of a run that hold samples, by step."""
    folder = run / FOLDER
    try:
        found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    except OSError:
        return []
    return sorted((path for path in found if (path / SAMPLES_FILE).is_file()), key=step_of)


def read_samples(folder: Path, problems: list[str]) -> list[SampleAnswer]:
    """The answers of a step.

    Args:
        folder: From ``list_samples``.
        problems: Takes a sentence about what cannot be read.
    """
    return [
        SampleAnswer(_prompt(record.get("prompt")), parts)
        for record, parts in read_answer_lines(folder, problems, MOST_ANSWERS)
    ]


def read_answer_lines(
    folder: Path, problems: list[str], most_parts: int
) -> Iterator[tuple[Mapping[str, Any], list[SamplePart]]]:
    """The records of ``samples.jsonl`` with the parts of their answers, at most ``MOST_ANSWERS``.

    Args:
        folder: Of the answers.
        problems: Takes a sentence about what cannot be read.
        most_parts: The parts of an answer that are read.
    """
    broken = BrokenLines(folder / SAMPLES_FILE)
    try:
        records = read_objects(folder / SAMPLES_FILE, broken, has_step=False)
        for number, record in enumerate(records):
            if number >= MOST_ANSWERS:
                break
            content = record.get("content")
            parts = content if isinstance(content, list) else []
            found = (read_part(folder, part) for part in parts[:most_parts])
            yield record, [part for part in found if part is not None]
    except DataError as error:
        problems.append(str(error))
    if str(broken):
        problems.append(f"{folder.name}: {broken}")


def read_part(folder: Path, part: Any) -> SamplePart | None:
    """A part of an answer in ``samples.jsonl``; None if it is neither a text nor an image.

    Args:
        folder: Where the images lie.
        part: A value of JSON.
    """
    if not isinstance(part, Mapping):
        return None
    text, image = part.get("text"), part.get("image")
    if part.get("type") == "text" and isinstance(text, str):
        return SamplePart(text[:_LONGEST_TEXT], None)
    if part.get("type") == "image" and isinstance(image, str):
        return SamplePart("", _inside(folder, image))
    return None


def _inside(folder: Path, name: str) -> Path | None:
    """A file that lies in a folder, also when links are followed; None if it does not.

    A report shows what is in the run and no other file of the machine.
    """
    with suppress(OSError, ValueError, RuntimeError):
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    return None


def _prompt(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value or "")[:_LONGEST_TEXT]
    image, text, force = (value.get(key) for key in ("image", "text", "force"))
    words = [Path(image).name if isinstance(image, str) else "", str(text or "")]
    words.append(f"({force})" if force else "")
    return " ".join(word for word in words if word)[:_LONGEST_TEXT] or "(no prompt)"
