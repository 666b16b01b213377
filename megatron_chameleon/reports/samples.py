"""The samples of a run over time: its pictures, made small, and its texts."""

from pathlib import Path

from megatron_chameleon.checkpoint.state.folders import step_of
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.images.thumbnails import thumbnail_of_file
from megatron_chameleon.pages.elements import escape, heading, how, image, sample, samples
from megatron_chameleon.runs.answers.samples import SamplePart, list_samples, read_samples
from megatron_chameleon.wording import at_even_distances, counted

MOST_STEPS = 10
"""Steps that are shown, spread evenly over the run; the first and the last among them."""
MOST_PROMPTS = 12
MOST_IMAGES = 160
"""Of the whole section: about 30 KB each."""
SIDE = 128
"""Pixels of the longer side of a picture."""
_MOST_PARTS = 12
_LONGEST_TEXT = 500


def sample_section(run: Path, problems: list[str], most_steps: int = MOST_STEPS) -> str:
    """The answers to each prompt, by step.

    Args:
        run: The run folder.
        problems: Takes a sentence about each thing that cannot be read.
        most_steps: Steps that are shown, spread evenly over the run, with the first and the last.
    """
    folders = list_samples(run)
    if not folders:
        return how(
            "The run has written no samples. Set logging.sample_every_steps and",
            "logging.sample_prompts to see what the model writes during training.",
        )
    chosen = at_even_distances(folders, most_steps)
    answers: dict[str, list[str]] = {}
    budget = PictureBudget()
    for folder in reversed(chosen):  # the newest get their pictures first
        for answer in read_samples(folder, problems)[:MOST_PROMPTS]:
            figures = answers.setdefault(answer.prompt, [])
            parts = "".join(part_content(part, budget) for part in answer.parts[:_MOST_PARTS])
            caption = f"step {step_of(folder):,}"
            figures.insert(0, sample(parts or "<p>(nothing)</p>", caption))
    problems += budget.problems
    body = []
    for prompt, figures in list(answers.items())[:MOST_PROMPTS]:
        body.append(heading(prompt[:_LONGEST_TEXT], 3))
        body.append(samples(figures))
    if len(chosen) < len(folders):
        text = f"{len(chosen)} of {counted(len(folders), 'step')} with samples are shown."
        body.insert(0, how(text))
    return "".join(body)


class PictureBudget:
    """How many more pictures the page may hold."""

    def __init__(self) -> None:
        self.left = MOST_IMAGES
        self.problems: list[str] = []

    def picture(self, path: Path) -> str:
        if self.left <= 0:
            return '<p class="pale">(a picture that is left out)</p>'
        self.left -= 1
        try:
            return image(thumbnail_of_file(path, SIDE), f"picture {path.name}")
        except ChameleonError as error:
            if len(self.problems) < 3:
                self.problems.append(str(error))
            return '<p class="pale">(a picture that cannot be read)</p>'


def part_content(part: SamplePart, budget: PictureBudget) -> str:
    if part.image is not None:
        return budget.picture(part.image)
    if not part.text:
        return '<p class="pale">(a picture that is not in the folder)</p>'
    cut = "…" if len(part.text) > _LONGEST_TEXT else ""
    return f"<p>{escape(part.text[:_LONGEST_TEXT])}{cut}</p>"
