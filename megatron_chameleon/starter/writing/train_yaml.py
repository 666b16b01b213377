"""``train.yaml``: every key that matters, with its meaning from the schema and a fitting value."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chameleon.config.explanations import explanations
from megatron_chameleon.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_chameleon.starter.writing.yaml_text import Entry, comment, scalar, section

HEAD = """\
# Written by `chameleon init`. The lines above a key say what it means, and `Here` why it has this
# value. Change what you like: `chameleon train {name} --dry-run` checks it. A key that is not here
# has its default: `chameleon config check {name}` shows all of them.
"""
PRESET = (
    "The paper's model, optimizer and schedule: every value of this preset holds unless it is set "
    "below."
)
MOVED = "This folder, for ${variables.folder} below. Change it if you move the folder."
FOLDER = "${variables.folder}"
SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


@dataclass
class Prompt:
    """One of ``logging.sample_prompts``."""

    text: str = ""
    image: str | None = None
    force: str | None = None

    def line(self) -> str:
        values = {"text": self.text, "image": self.image, "force": self.force}
        given = (f"{key}: {scalar(value)}" for key, value in values.items() if value)
        return f"- {{{', '.join(given) or 'text: ' + scalar('')}}}"


@dataclass
class TrainSettings:
    """What ``train.yaml`` says."""

    folder: str
    preset: str | None
    values: dict[str, dict[str, object]]
    """Section, key, value; keys of a preset are left out."""
    sources: Sequence[str]
    """Names of the token files in ``tokens/``."""
    image_first: Sequence[str]
    """Those with pairs of a picture and a text."""
    held_out: Sequence[str]
    prompts: Sequence[Prompt] = ()
    why: dict[str, str] = field(default_factory=dict)
    """``section.key`` -> why it has this value."""


def train_yaml(settings: TrainSettings) -> str:
    """The text of ``train.yaml``."""
    lines = [HEAD.format(name="train.yaml").rstrip()]
    if settings.preset:
        lines += ["", *comment(PRESET), f"preset: {settings.preset}"]
    lines += ["", *comment(MOVED), "variables:", f"  folder: {scalar(settings.folder)}"]
    text = "\n".join(lines) + "\n"
    for name, cls in SECTIONS.items():
        meanings = explanations(cls)
        entries = [
            Entry(key, value, meanings.get(key, ""), settings.why.get(f"{name}.{key}", ""))
            for key, value in settings.values.get(name, {}).items()
        ]
        if name == "data":
            text += section("tokenizer", [Entry("path", f"{FOLDER}/tokenizer", "")])
            entries = [*_data_entries(settings), *entries]
        if name == "logging" and settings.prompts:
            what = "What the model answers while it trains; text and images go into samples/."
            raw = "\n".join(prompt.line() for prompt in settings.prompts)
            entries.append(Entry("sample_prompts", None, what, raw=raw))
        if entries:
            text += section(name, entries, _about(cls))
    return text


def _about(cls: type[Any]) -> str:
    """The first sentence of a section's docstring; dataclasses make one up if there is none."""
    doc = (cls.__doc__ or "").strip()
    return "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split("\n\n")[0].split())


def _data_entries(settings: TrainSettings) -> list[Entry]:
    meanings, of_source = explanations(DataConfig), explanations(SourceConfig)
    stage1 = "\n".join(
        f"- {{prefix: {scalar(f'{FOLDER}/tokens/{name}')}, weight: 1.0"
        f"{', image_first: 0.5' if name in settings.image_first else ''}}}"
        for name in settings.sources
    )
    what = [meanings["stage1"], f"weight: {of_source['weight']}"]
    if settings.image_first:
        what.append(f"image_first: {of_source['image_first']}")
    entries = [Entry("stage1", None, " ".join(what), raw=stage1)]
    if not settings.held_out:
        return entries
    of_validation = explanations(ValidationConfig)
    every = settings.values["validation"]
    lines: list[str] = []
    for key, value in every.items():
        lines += [*comment(of_validation.get(key, "")), f"{key}: {scalar(value)}"]
    lines += [*comment(of_validation["sources"]), "sources:"]
    lines += [
        f"  - {{prefix: {scalar(f'{FOLDER}/tokens/{name}-holdout')}, name: {scalar(name)}"
        f"{', image_first: 0.5' if name in settings.image_first else ''}}}"
        for name in settings.held_out
    ]
    about = " ".join((ValidationConfig.__doc__ or "").split())
    return [*entries, Entry("validation", None, about, raw="\n".join(lines))]
