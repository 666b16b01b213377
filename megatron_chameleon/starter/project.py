"""Writes the folder of ``chameleon init``: ``train.yaml``, ``image.yaml`` and ``run.sh``.

project = plan_project(Wanted(["photos/"], Path("runs/photos")))
write_project(project)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.files import make_folder, write_text
from megatron_chameleon.planner.search import LayoutPlan
from megatron_chameleon.starter.choose import (
    CODES_WITHOUT_PICTURES,
    FALLBACK_TEXT,
    PRESETS,
    SMALL,
    TINY,
    Holdout,
    TextVocabulary,
    holdout,
    image_shape,
    model_config,
    side_of,
    text_vocabulary,
)
from megatron_chameleon.starter.layout import best_layout, parallel_values
from megatron_chameleon.starter.looking.look import Looked, Looking, look
from megatron_chameleon.starter.measure import Machine, Speeds, find_machine, measure
from megatron_chameleon.starter.prompts import asked, sample_prompts
from megatron_chameleon.starter.settings import RunLength, run_length, train_values
from megatron_chameleon.starter.writing.image_yaml import ImageShape, image_training, image_yaml
from megatron_chameleon.starter.writing.run_script import ScriptSettings, run_script
from megatron_chameleon.starter.writing.train_yaml import TrainSettings, train_yaml

IMAGE_SECONDS = 150.0
"""Time of the image tokenizer's training for ``tiny``."""
TEXT_FILE = "tokenizer_text.txt"


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    data: Sequence[str]
    output: Path
    size: str | None = None
    """None: tiny on a machine without GPU, else small."""
    looking: Looking = field(default_factory=Looking)
    seed: int = 1


@dataclass
class Project:
    """Everything that was found and chosen."""

    wanted: Wanted
    looked: Looked
    machine: Machine
    size: str
    side: int
    image: ImageShape | None
    vocabulary: TextVocabulary
    model: ModelConfig | None
    """None with a preset."""
    holdout: Holdout
    speeds: Speeds
    image_steps: int
    length: RunLength
    plan: LayoutPlan | None = None
    """The layout of a preset; None with the other sizes."""

    @cached_property
    def train(self) -> TrainSettings:
        """What ``train.yaml`` says."""
        return _train_settings(self)

    @cached_property
    def script(self) -> ScriptSettings:
        """What ``run.sh`` does."""
        return _script_settings(self)

    @property
    def files(self) -> dict[str, str]:
        """Name -> content of each file of the folder."""
        found = {"train.yaml": train_yaml(self.train), "run.sh": run_script(self.script)}
        if self.image is not None:
            training = image_training(self.image, self.image_steps, self.speeds.image_step)
            found["image.yaml"] = image_yaml(self.image, training, self.side)
        if self.script.fallback_text:
            found[TEXT_FILE] = f"{FALLBACK_TEXT}\n"
        return found


def plan_project(wanted: Wanted) -> Project:
    """Look at the data and the machine, and choose.

    Raises:
        ChameleonError: The data cannot be read or trained on.
    """
    looked = look(wanted.data, wanted.looking)
    machine = find_machine()
    size = wanted.size or (SMALL if machine.gpu else TINY)
    side, pictures = side_of(looked), sum(source.pictures for source in looked.sources)
    image = image_shape(size, side, pictures) if pictures else None
    codes = image.codebook_size if image else CODES_WITHOUT_PICTURES
    vocabulary = text_vocabulary(looked, size, codes)
    longest = _longest(looked, vocabulary, image)
    model = None if size in PRESETS else model_config(size, longest)
    held = holdout(looked.sources)
    timed = size == TINY and machine.gpu is None
    speeds = measure(model, vocabulary.size, 4, image) if timed else Speeds()
    length = run_length(looked, vocabulary, image, model, size, speeds)
    image_steps = _image_steps(size, speeds)
    plan = best_layout(PRESETS[size], vocabulary.size) if size in PRESETS else None
    return Project(
        wanted, looked, machine, size, side, image, vocabulary, model, held, speeds,
        image_steps, length, plan,
    )  # fmt: skip


def _longest(looked: Looked, vocabulary: TextVocabulary, image: ImageShape | None) -> int:
    """Tokens of the documents that must stay whole: nearly the longest."""
    found = sorted(
        round(entry.characters / vocabulary.characters_per_token)
        + entry.pictures * (image.codes + 2 if image else 0)
        + 2
        for source in looked.sources
        for entry in source.tally.seen
        if entry.pictures or source.tally.conversations
    )
    return found[min(len(found) * 98 // 100, len(found) - 1)] if found else 0


def _image_steps(size: str, speeds: Speeds) -> int:
    if size == TINY:
        step = speeds.image_step or 0.1
        return max(min(round(IMAGE_SECONDS / step), 1500), 100)
    return 20_000 if size == SMALL else 500_000


def _train_settings(project: Project) -> TrainSettings:
    looked, held = project.looked, project.holdout
    paired = [s.name for s in looked.sources if any(e.caption for e in s.tally.seen)]
    values, why = train_values(
        project.size, project.model, project.length, bool(held.sources), project.wanted.seed
    )
    if project.plan is not None:
        values["parallel"] = parallel_values(project.plan)
        if project.plan.config.parallel.pipeline_model_parallel_size > 1:
            del values["logging"]["sample_every_steps"]  # a model in several stages cannot answer
        values["training"]["micro_batch_size"] = project.plan.config.training.micro_batch_size
        gpus = f"{project.plan.request.gpus} {project.plan.request.gpu.name.upper()}"
        why["parallel.use_distributed_optimizer"] = (
            f"the layout that `chameleon plan` finds for {gpus}"
        )
    return TrainSettings(
        folder=str(project.wanted.output.absolute()),
        preset=PRESETS.get(project.size),
        values=values,
        why=why,
        sources=[source.name for source in looked.sources],
        image_first=paired,
        held_out=held.sources,
        prompts=sample_prompts(looked, held),
    )


def _script_settings(project: Project) -> ScriptSettings:
    looked, wanted = project.looked, project.wanted
    loose = [source.name for source in looked.sources if source.is_loose]
    has_text = any(source.tally.texts for source in looked.sources)
    roots = [*looked.found.roots, *wanted.looking.images.roots]
    return ScriptSettings(
        python=sys.executable,
        threads=min(project.machine.cores, 8),
        data=[_absolute(word) for word in wanted.data] if loose else [],
        collected=loose,
        excluded=[str(wanted.output.absolute())],
        claimed=sorted(_named_folders(looked)),
        captions=wanted.looking.captions,
        words={source.name: source.words for source in looked.sources},
        fallback_text=not has_text,
        vocab_size=project.vocabulary.size,
        image_codes=project.image.codebook_size if project.image else CODES_WITHOUT_PICTURES,
        has_pictures=project.image is not None,
        image_roots=roots if project.image else [],
        holdout=project.holdout.share,
        undivided=project.holdout.undivided,
        workers=min(project.machine.cores, 8),
        prompts=asked(project.train.prompts, looked),
        has_held_out=bool(project.holdout.sources),
        launch=_launch(project),
        notes=_notes(project),
        seed=wanted.seed,
    )


def _launch(project: Project) -> str:
    """How the training is started: by SLURM with a layout for many GPUs, else as one process."""
    return "" if project.plan is None else '${LAUNCH:-srun} "$PYTHON" -m megatron_chameleon'


def _notes(project: Project) -> list[str]:
    if project.plan is None:
        return []
    gpus = project.plan.request.gpus
    return [
        f"The training needs {gpus} GPUs. Run the steps before it here, and start it with",
        f"slurm/pretrain_{project.size}.sbatch of the project (CONFIG=train.yaml), or in a job of",
        f"{gpus} tasks by `bash run.sh train`; then run the steps after it.",
    ]


def _named_folders(looked: Looked) -> set[str]:
    """Folders of pictures that documents name, so that they are not collected as loose ones."""
    return {
        str(folder.resolve())
        for source in looked.sources
        if not source.is_loose
        for folder in source.tally.folders
    }


def _absolute(word: str) -> str:
    return word if "://" in word else str(Path(word).absolute())


def write_project(project: Project) -> list[Path]:
    """Write the files; returns them.

    Raises:
        DataError: The folder cannot be written.
    """
    folder = make_folder(project.wanted.output)
    written = []
    for name, content in project.files.items():
        write_text(folder / name, content)
        written.append(folder / name)
    (folder / "run.sh").chmod(0o755)
    return written
