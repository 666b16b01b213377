"""The samples of a run over time: its pictures, made small, and its texts."""

import io
from pathlib import Path

from PIL import Image

from megatron_chameleon.checkpoint.state.folders import step_of
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.files import read_bytes
from megatron_chameleon.images.decoding import decode_image
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import PixelError, upright_rgb
from megatron_chameleon.pages.elements import escape, heading, how, image
from megatron_chameleon.runs.answers.samples import SamplePart, list_samples, read_samples
from megatron_chameleon.runs.run import RunRecord
from megatron_chameleon.wording import counted

MOST_STEPS = 10
"""Steps that are shown, spread evenly over the run; the first and the last among them."""
MOST_PROMPTS = 12
MOST_IMAGES = 160
"""Of the whole section: about 30 KB each."""
SIDE = 128
"""Pixels of the longer side of a picture."""
_MOST_PARTS = 12
_LONGEST_TEXT = 500
_LARGEST_FILE = 32 << 20


def sample_section(run: RunRecord, problems: list[str]) -> str:
    """The answers to each prompt, by step.

    Args:
        run: The run.
        problems: Takes a sentence about each thing that cannot be read.
    """
    folders = list_samples(run.path)
    if not folders:
        return how(
            "The run has written no samples. Set logging.sample_every_steps and",
            "logging.sample_prompts to see what the model writes during training.",
        )
    chosen = _spread(folders, MOST_STEPS)
    answers: dict[str, list[str]] = {}
    budget = PictureBudget()
    for folder in reversed(chosen):  # the newest get their pictures first
        for answer in read_samples(folder, problems)[:MOST_PROMPTS]:
            figures = answers.setdefault(answer.prompt, [])
            parts = "".join(part_content(part, budget) for part in answer.parts[:_MOST_PARTS])
            caption = f"<figcaption>step {step_of(folder):,}</figcaption>"
            figures.insert(0, f"<figure>{caption}{parts or '<p>(nothing)</p>'}</figure>")
    problems += budget.problems
    body = []
    for prompt, figures in list(answers.items())[:MOST_PROMPTS]:
        body.append(heading(prompt[:_LONGEST_TEXT], 3))
        body.append(f'<div class="samples">{"".join(figures)}</div>')
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
            return image(thumbnail(path), f"picture {path.name}")
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


def thumbnail(path: Path) -> bytes:
    """A picture as a PNG of at most ``SIDE`` pixels a side, written anew.

    Raises:
        ChameleonError: It cannot be read or decoded.
    """
    data = read_bytes(path, limit=_LARGEST_FILE)
    try:
        picture = upright_rgb(decode_image(data, str(path), ImageOptions()))
    except PixelError as error:
        raise ImageError(str(path), str(error), "Replace or remove it") from error
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _spread(folders: list[Path], most: int) -> list[Path]:
    """At most so many, at even distances, the first and the last among them."""
    if len(folders) <= most:
        return folders
    last = len(folders) - 1
    return [folders[round(number * last / (most - 1))] for number in range(most)]
