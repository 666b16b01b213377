"""Let the model write text and images every few steps of training, and show them on a page.

``samples/step_00001000/`` holds ``samples.jsonl`` and the images of a step; ``samples/index.html``
shows them by prompt. The model that is being trained writes them, on rank 0 and the ranks that
share its tensors, as ``chameleon generate`` would do with a checkpoint of the step. Training is not
affected, and a sample that cannot be written does not end it.
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_chameleon.checkpoint.state.folders import step_folder
from megatron_chameleon.config.schema import Config, SamplePromptConfig
from megatron_chameleon.errors import ChameleonError, ConfigError, PeerError, TrainingError
from megatron_chameleon.files import make_folder, write_text, write_together
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.masking import masked_command
from megatron_chameleon.pages.elements import how, notes
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.reports.samples import sample_section
from megatron_chameleon.runs.answers.samples import SAMPLES_FILE
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.training.samples.trained_model import TrainedModel

if TYPE_CHECKING:
    from megatron_chameleon.inference.answers.answer import Answer
    from megatron_chameleon.inference.session import Session

MOST_STEPS = 30
"""Steps on the page; its pictures are inside it, made small."""


def check_samples(config: Config) -> None:
    """Check before training that the image tokenizer and the images of the prompts exist.

    Raises:
        ChameleonError: Something is missing.
    """
    if not config.logging.sample_every_steps:
        return
    load_tokenizer(config.tokenizer.path, images=None)
    for i, prompt in enumerate(config.logging.sample_prompts):
        if prompt.image is not None and not Path(prompt.image).is_file():
            what = f"no such image file: {prompt.image}"
            where = f"logging.sample_prompts[{i}].image"
            raise ConfigError(where, what, "Give the path of an image, or null")


class Sampler:
    """Writes the samples of a run.

    Args:
        config: A checked config.
        trained: The model that is asked; None if the config wants no samples.
    """

    def __init__(self, config: Config, trained: TrainedModel | None) -> None:
        self._config, self._trained = config, trained
        self._every = config.logging.sample_every_steps
        self._folder = Path(config.logging.run_dir) / "samples"

    def is_due(self, step: int) -> bool:
        """Whether the config wants samples after this step, counted from 1."""
        return self._every > 0 and step % self._every == 0

    def is_missing(self, step: int) -> bool:
        """Whether the samples after a step are wanted and not there: for rank 0.

        A run that is killed while it samples has saved the step already.
        """
        folder = self._folder / step_folder(step)
        can_answer = self._trained is not None
        return can_answer and self.is_due(step) and not (folder / SAMPLES_FILE).is_file()

    def sample(self, step: int, model: Any) -> str:
        """Write the samples of a step on rank 0. A collective of its tensor-parallel group.

        Args:
            step: The step that was just done, counted from 1.
            model: This rank's part of the model, whose weights are those after the step. It is as
                before afterwards.

        Returns:
            A line for the user; empty on the other ranks.

        Raises:
            TrainingError: On rank 0, if the file system refuses a file.
            PeerError: Another rank has ended.
        """
        if self._trained is None or not self._trained.takes_part:
            return ""
        prompts = self._config.logging.sample_prompts
        try:
            answers = self._trained.ask(model, step, len(prompts), self._answer)
            if answers is None:
                return ""
            folder = self._folder / step_folder(step)
            _write_answers(folder, prompts, answers)
            _write_index(Path(self._config.logging.run_dir), self._config)
        except (TrainingError, PeerError):  # the folder or the disk, or the job
            raise
        except (ChameleonError, OSError, torch.OutOfMemoryError) as error:
            return f"step {step}: no samples were written: {str(error).splitlines()[0]}"
        return f"sampled {folder}"

    def _answer(self, session: "Session") -> "list[Answer]":
        logging = self._config.logging
        options = [
            GenerationOptions(
                max_tokens=logging.sample_max_tokens,
                force=Force(prompt.force) if prompt.force else None,
                seed=self._config.training.seed,
            )
            for prompt in logging.sample_prompts
        ]
        return session.generate_each([_parts(p) for p in logging.sample_prompts], options)


def _parts(prompt: SamplePromptConfig) -> list[Any]:
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import TextPart

    parts: list[Any] = [] if prompt.image is None else [ImagePart(prompt.image)]
    return [*parts, TextPart(prompt.text)] if prompt.text else parts


def _write_answers(
    folder: Path, prompts: Sequence[SamplePromptConfig], answers: "Sequence[Answer]"
) -> None:
    from megatron_chameleon.inference.answers.files import parts_and_images

    make_folder(folder, TrainingError)
    lines = []
    images: dict[Path, bytes] = {}
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        parts, files = parts_and_images(number, answer)
        images.update({folder / name: content for name, content in files.items()})
        line = {"prompt": vars(prompt), "content": parts, "token_ids": answer.token_ids}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    text = "".join(lines).encode("utf-8", "surrogatepass")
    write_together({folder / SAMPLES_FILE: text, **images}, TrainingError)


def _write_index(run: Path, config: Config) -> None:
    """Write the page of all steps in the folder of the samples."""
    problems: list[str] = []
    body = sample_section(run, problems, MOST_STEPS)
    text = "What the model wrote while it was trained; each step has a folder beside this page."
    folder = run / "samples"
    seed, command = config.training.seed, masked_command(sys.argv)
    origin = Origin(command, datetime.now(UTC), run.resolve().name, seed)
    parts = [how(text), notes((problem, "warn") for problem in problems), body]
    write_text(folder / "index.html", page("Samples", parts, origin), TrainingError)
