"""Whether a model answers in the modality that is asked for: ``modalities/step_00001000/``.

Source: paper, section 3.2. A model that is fine-tuned almost entirely on one modality learns to
answer in it, whatever it is asked. ``modalities.json`` counts what the model did, and
``samples.jsonl`` beside it has every prompt and answer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import STEP_FOLDER, step_of
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json_object
from megatron_chameleon.runs.answers.samples import SamplePart, read_answer_lines
from megatron_chameleon.wording import counted

FOLDER = "modalities"
CHECK_FILE = "modalities.json"
FORMAT = "megatron_chameleon.modalities/1"
COLLAPSED = 0.5
"""Below this share of right answers, the modality that was asked for has collapsed."""
WEAK = 0.9
"""Below this share, there is a warning."""
FEWEST = 4
"""With fewer prompts of a kind, one answer more or less would decide, and nothing is judged."""
_MOST_PARTS = 20
_LARGEST_COUNT = 10**9
_LARGEST_FILE = 1 << 24
_LONGEST_TEXT = 2000


class Modality(StrEnum):
    """What an answer consists of; a text of nothing but white space does not count."""

    TEXT = "text"
    IMAGE = "one image"
    IMAGES = "several images"
    BOTH = "text and images"
    NOTHING = "nothing"


ASKED_FOR = {
    Modality.TEXT: "text questions",
    Modality.IMAGE: "drawing requests",
    Modality.IMAGES: "requests for several images",
    Modality.BOTH: "requests for text and images",
}
"""What the prompts are called that ask for a modality."""


def modality_of(has_text: bool, images: int) -> Modality:
    """The modality of an answer with or without a text, and with so many whole images."""
    if has_text:
        return Modality.BOTH if images else Modality.TEXT
    if images:
        return Modality.IMAGE if images == 1 else Modality.IMAGES
    return Modality.NOTHING


@dataclass(frozen=True)
class ModalityCounts:
    """What the model answered to the prompts that ask for one modality."""

    expected: Modality
    """Of the held-out answer, or what a built-in prompt asks for."""
    is_built_in: bool
    """Whether the prompts are the built-in ones, for want of held-out ones."""
    given: Mapping[Modality, int]
    """Answers by what they consist of."""
    cut_off: int
    """Answers that the model had not ended when the limit was reached."""

    @property
    def asked(self) -> int:
        return sum(self.given.values())

    @property
    def right(self) -> int:
        """Answers in the modality that was asked for."""
        return self.given.get(self.expected, 0)

    @property
    def name(self) -> str:
        """Such as "drawing requests"."""
        return f"{'built-in ' * self.is_built_in}{ASKED_FOR[self.expected]}"

    def sentence(self) -> str:
        """Such as "drawing requests: 14 of 16 answered with one image, 2 with text"."""
        others = [
            f"{self.given[kind]} with {kind}"
            for kind in Modality
            if self.given.get(kind) and kind is not self.expected
        ]
        cut = f"; {self.cut_off} cut off" if self.cut_off else ""
        right = f"{self.right} of {self.asked} answered with {self.expected}"
        return f"{self.name}: {', '.join([right, *others])}{cut}"


@dataclass(frozen=True)
class ModalityCheck:
    """What was found after a step."""

    step: int
    counts: list[ModalityCounts]
    max_tokens: int
    """An answer was cut off after so many tokens."""
    notes: list[str] = field(default_factory=list)
    """What was not asked, and why."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """What the owner should read: a line for each kind of prompt, and what is wrong besides.

        Each with its weight: ``bad`` for a modality that has collapsed, ``warn``, or nothing.
        """
        for counts in self.counts:
            share = counts.right / counts.asked if counts.asked else 1.0
            is_judged = not counts.is_built_in and counts.expected in _COLLAPSES
            if is_judged and counts.asked < FEWEST:
                few = f"{counted(counts.asked, 'prompt')} {'is' if counts.asked == 1 else 'are'}"
                yield f"{counts.sentence()}. {few} too few to tell. {_HOLD_OUT_MORE}", ""
            elif is_judged and share < COLLAPSED:
                yield f"{_COLLAPSES[counts.expected]} ({counts.sentence()}). {_REMEDY}", "bad"
            elif is_judged and share < WEAK:
                yield f"Some answers are in the wrong modality ({counts.sentence()})", "warn"
            else:
                yield counts.sentence(), ""
        judged = [counts for counts in self.counts if not counts.is_built_in]
        cut_off, asked = (sum(getattr(c, key) for c in judged) for key in ("cut_off", "asked"))
        if asked >= FEWEST and asked - cut_off < WEAK * asked:
            text = f"{cut_off} of {counted(asked, 'answer')} did not end within "
            yield f"{text}{self.max_tokens:,} tokens", "warn"

    def warnings(self) -> list[str]:
        """The lines that have a weight."""
        return [text for text, weight in self.lines() if weight]

    def as_json(self) -> dict[str, Any]:
        """The content of ``modalities.json``."""
        return {
            "format": FORMAT,
            "step": self.step,
            "max_tokens": self.max_tokens,
            "counts": [
                {
                    "expected": counts.expected,
                    "prompts": "built-in" if counts.is_built_in else "held-out",
                    "asked": counts.asked,
                    "given": {kind: counts.given.get(kind, 0) for kind in Modality},
                    "cut_off": counts.cut_off,
                }
                for counts in self.counts
            ],
            "warnings": self.warnings(),
            "notes": self.notes,
        }


_COLLAPSES = {
    Modality.TEXT: "Text has collapsed: most text questions are not answered with text",
    Modality.IMAGE: "Images have collapsed: most drawing requests are not answered with one image",
}
_REMEDY = (
    "Give the sources that answer in this modality more weight, or stop earlier "
    '(docs/fine-tuning.md, "Balance of modalities")'
)


_HOLD_OUT_MORE = (
    f"Hold out at least {FEWEST} different prompts of this kind (a larger share in `chameleon "
    "preprocess --holdout`), and ask as many (data.validation.modality_prompts)"
)


@dataclass(frozen=True)
class CheckedAnswer:
    """One prompt and its answer."""

    expected: str
    given: str
    is_cut_off: bool
    prompt: str
    """In words; an image is ``[image]``."""
    parts: list[SamplePart]


def list_checks(run: Path) -> list[Path]:
    """The folders of a run that hold checks, by step."""
    try:
        found = [path for path in (run / FOLDER).iterdir() if STEP_FOLDER.fullmatch(path.name)]
    except OSError:
        return []
    return sorted((path for path in found if (path / CHECK_FILE).is_file()), key=step_of)


def read_check(folder: Path) -> ModalityCheck:
    """What was found after a step.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / CHECK_FILE
    found = read_json_object(path, limit=_LARGEST_FILE)
    try:
        counts = [_read_counts(entry) for entry in found["counts"][: len(Modality) * 2]]
        notes = [str(note)[:_LONGEST_TEXT] for note in found.get("notes", [])[:20]]
        return ModalityCheck(_count(found["step"]), counts, _count(found["max_tokens"]), notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"is not a check of modalities ({type(error).__name__})"
        raise DataError(str(path), what, "Run chameleon evaluate-modalities again") from error


def _read_counts(entry: Mapping[str, Any]) -> ModalityCounts:
    expected = Modality(entry["expected"])
    given = {Modality(kind): _count(number) for kind, number in entry["given"].items()}
    ASKED_FOR[expected]
    return ModalityCounts(expected, entry["prompts"] == "built-in", given, _count(entry["cut_off"]))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
        raise ValueError(value)
    return value


def read_answers(folder: Path, problems: list[str]) -> list[CheckedAnswer]:
    """The prompts and answers of a check.

    Args:
        folder: From ``list_checks``.
        problems: Takes a sentence about what cannot be read.
    """
    answers: list[CheckedAnswer] = []
    for record, shown in read_answer_lines(folder, problems, _MOST_PARTS):
        expected, given, prompt = (
            str(record.get(key) or "")[:_LONGEST_TEXT] for key in ("expected", "given", "prompt")
        )
        is_cut = record.get("cut_off") is True
        answers.append(CheckedAnswer(expected, given, is_cut, prompt, shown))
    return answers
