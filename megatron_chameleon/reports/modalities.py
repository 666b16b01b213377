"""Whether the model of a run answers in the modality that it is asked for."""

from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import step_of
from megatron_chameleon.errors import DataError
from megatron_chameleon.pages.elements import Cell, escape, heading, how, samples, table
from megatron_chameleon.reports.samples import PictureBudget, part_content
from megatron_chameleon.runs.answers.modalities import (
    CheckedAnswer,
    Modality,
    ModalityCheck,
    list_checks,
    read_answers,
    read_check,
)
from megatron_chameleon.runs.run import RunRecord

MOST_CHECKS = 10
EXAMPLES = 4
"""Of each kind of prompt; wrong answers come first."""
_LONGEST_PROMPT = 500


def read_checks(run: RunRecord) -> list[tuple[Path, ModalityCheck]]:
    """The newest checks of a run, by step; a damaged one is a problem of the run."""
    found = []
    for folder in list_checks(run.path)[-MOST_CHECKS:]:
        try:
            found.append((folder, read_check(folder)))
        except DataError as error:
            run.problems.append(str(error))
    return found


def modality_section(run: RunRecord, checks: list[tuple[Path, ModalityCheck]]) -> str:
    """A row for each kind of prompt, and examples of the newest check.

    Args:
        run: Takes a sentence about each thing that cannot be read.
        checks: From ``read_checks``.
    """
    if not checks:
        return how(
            "Nobody has looked. Name held-out conversations in data.validation.sources, or use",
            "chameleon evaluate-modalities, to see whether text questions get text and drawing",
            "requests one image.",
        )
    rows = [
        (
            f"{check.step:,}",
            counts.name,
            f"{counts.asked}",
            *(f"{counts.given.get(kind, 0)}" for kind in Modality),
            f"{counts.cut_off}",
        )
        for _, check in reversed(checks)
        for counts in check.counts
    ]
    heads: tuple[str | Cell, ...] = (
        *(Cell("step", "n"), "prompts", Cell("asked", "n")),
        *(Cell(str(kind), "n") for kind in Modality),
        Cell("cut off", "n"),
    )
    text = how(
        "What the model answered to held-out prompts, at temperature 0, by what their held-out",
        "answers consist of. A model that was trained too much on one modality answers in it",
        "whatever it is asked.",
    )
    folder, newest = checks[-1]
    return text + table(heads, rows) + "".join(map(how, newest.notes)) + _examples(run, folder)


def modality_findings(checks: list[tuple[Path, ModalityCheck]]) -> list[tuple[str, str]]:
    """What the owner of the run must know of the newest check, for ``pages.elements.notes``."""
    if not checks:
        return []
    return [(f"{text[0].upper()}{text[1:]}.", weight) for text, weight in checks[-1][1].lines()]


def _examples(run: RunRecord, folder: Path) -> str:
    answers = read_answers(folder, run.problems)
    budget = PictureBudget()
    body = [heading(f"Answers after step {step_of(folder):,}", 3)]
    for expected in dict.fromkeys(answer.expected for answer in answers):
        own = [answer for answer in answers if answer.expected == expected]
        own.sort(key=lambda answer: answer.given == expected)
        figures = (_figure(answer, budget) for answer in own[:EXAMPLES])
        body.append(how(f"Expected: {expected}") + samples(figures))
    run.problems.extend(budget.problems)
    return "".join(body) if answers else ""


def _figure(answer: CheckedAnswer, budget: PictureBudget) -> str:
    cut = ", cut off" if answer.is_cut_off else ""
    prompt = escape(answer.prompt[:_LONGEST_PROMPT])
    content = "".join(part_content(part, budget) for part in answer.parts) or "<p>(nothing)</p>"
    caption = f"<figcaption>{prompt}<br>{escape(answer.given)}{cut}</figcaption>"
    return f"<figure>{caption}{content}</figure>"
