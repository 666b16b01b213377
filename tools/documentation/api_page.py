"""The pages of the Python API: which objects are shown where. mkdocstrings writes their text."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """Objects under one heading."""

    heading: str
    names: tuple[str, ...]
    introduction: str = ""


@dataclass(frozen=True)
class ApiPage:
    """A page of the Python API."""

    title: str
    introduction: str
    groups: tuple[Group, ...] = field(default=())


_EXAMPLE = """\
```python
from megatron_chameleon import Session, convert, train

train("examples/digits/train.yaml", ["training.steps=1000"])
convert("runs/digits", "exported", to="hf")

session = Session.load("exported")
(image,) = session.draw(["a handwritten seven"])
image.save("seven.png")
print(session.caption([image]))
```
"""

PAGES = {
    "python": ApiPage(
        "Python API",
        "These names are imported from `megatron_chameleon` itself. Importing the package imports "
        "neither torch nor anything else that is heavy; a name is imported when it is used first. "
        "What other modules define may change between versions.\n\n" + _EXAMPLE,
        (
            Group(
                "Generation",
                ("Session", "GenerationOptions", "Force", "Answer"),
                "A model with its tokenizer, loaded from a run folder, a checkpoint or an exported "
                "folder.",
            ),
            Group("Conversion", ("convert", "ConversionResult")),
            Group("Training", ("train", "load_config")),
            Group(
                "Errors",
                (
                    "ChameleonError",
                    "ConfigError",
                    "ConfigErrors",
                    "DataError",
                    "CheckpointError",
                    "TrainingError",
                ),
                "The errors that a user can cause. Each says where it is, what is wrong, and what "
                "to do.",
            ),
        ),
    ),
}


def api_pages() -> dict[str, str]:
    """The text of each page by its name."""
    return {name: _text(page) for name, page in PAGES.items()}


def _text(page: ApiPage) -> str:
    lines = [f"# {page.title}", "", page.introduction, ""]
    for group in page.groups:
        lines += [f"## {group.heading}", "", group.introduction, ""]
        for name in group.names:
            lines += [f"::: megatron_chameleon.{name}", ""]
    return "\n".join(lines)
