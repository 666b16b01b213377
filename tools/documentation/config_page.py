"""The config reference: every key of every config file, from the dataclasses themselves.

Type, default and bounds come from the fields, the explanation from the docstring below each field,
and the paper's value from ``config/paper.py``.
"""

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.config import paper
from megatron_chameleon.config.constraints import field_constraints, without_null
from megatron_chameleon.config.explanations import explanations
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.filter.measures.options import FilterOptions
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from tools.documentation.text import code, prose

_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_STAGES = {"pretraining": "paper", "sft": "paper, fine-tuning"}


@dataclass(frozen=True)
class ConfigFile:
    """A kind of YAML file that the commands read."""

    name: str
    """Of the page, without suffix."""
    title: str
    cls: type
    introduction: str


FILES = (
    ConfigFile(
        "config",
        "Config of a training run",
        Config,
        "The YAML file of `chameleon train`, `plan`, `inspect` and `config`. Every key has a "
        "default, so a file names only what it changes. The key `preset` at the top takes the "
        "values of a preset (`chameleon_7b`, `chameleon_34b`) wherever the file sets none. A "
        "section `variables` may hold values of your own, which are used as `${variables.name}`. "
        "On the command line, `section.key=value` replaces a value, and an entry of a list is "
        "`data.stage1[0].weight=2`.\n\n"
        "`chameleon config check CONFIG` prints every value beside the paper's, and `chameleon "
        "train CONFIG --dry-run` tells whether the values fit together.",
    ),
    ConfigFile(
        "image-tokenizer-config",
        "Config of an image tokenizer",
        ImageTokenizerConfig,
        "The YAML file of `chameleon tokenizer image --config`, or the name of a preset. "
        "`section.key=value` behind the command replaces a value.",
    ),
    ConfigFile(
        "filter-config",
        "Config of a data filter",
        FilterOptions,
        "The YAML file of `chameleon data filter --config`. Each key is also an option of the "
        "command: `--min-words` for `min_words`.",
    ),
)


@dataclass(frozen=True)
class Key:
    """One key of a config file."""

    name: str
    """In full, such as ``data.stage1[].weight``."""
    kind: str
    default: str
    bounds: str
    explanation: str


def config_pages() -> dict[str, str]:
    """The text of each page by its name."""
    return {file.name: _page(file) for file in FILES}


def keys_of(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a dataclass and of all dataclasses inside of it, in the order of the fields."""
    return [key for _, keys in _sections(cls, prefix) for key in keys]


def _page(file: ConfigFile) -> str:
    lines = [f"# {file.title}", "", file.introduction, ""]
    published = _published() if file.cls is Config else {}
    for section, keys in _sections(file.cls):
        cls = _class_at(file.cls, section)
        if section:
            lines += [f"## {section} {{ #{anchor(section)} }}", "", *_summary(cls), ""]
        for key in keys:
            lines += [*_entry(key, published.get(key.name.replace("[]", ""), ())), ""]
    return "\n".join(lines)


def anchor(name: str) -> str:
    """Of a key or section: ``data-stage1-weight``."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def _entry(key: Key, published: typing.Iterable[str]) -> list[str]:
    facts = [key.kind, f"default {code(key.default)}", *filter(None, [key.bounds]), *published]
    title = f"### `{key.name}` {{ #{anchor(key.name)} }}"
    return [title, "", f"{' · '.join(facts)}", "{ .facts }", "", prose(key.explanation)]


def _sections(cls: type, prefix: str = "") -> Iterator[tuple[str, list[Key]]]:
    """A section's name with its own keys, then the sections inside of it."""
    hints = typing.get_type_hints(cls)
    explained, constraints = explanations(cls), field_constraints(cls)
    own, nested = [], []
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}".lstrip(".")
        inner, is_list = _dataclass_in(hints[field.name])
        explanation = explained.get(field.name, "")
        if inner is not None:
            nested.append((inner, name + ("[]" if is_list else "")))
        if inner is None or is_list:
            constraint = constraints.get(field.name)
            kind, bounds = _kind(hints[field.name]), str(constraint[0]) if constraint else ""
            own.append(Key(name, kind, _default(field), bounds, explanation))
    if own:
        yield prefix, own
    for inner, name in nested:
        yield from _sections(inner, name)


def _class_at(cls: type, section: str) -> type:
    for part in filter(None, section.split(".")):
        inner, _ = _dataclass_in(typing.get_type_hints(cls)[part.removesuffix("[]")])
        assert inner is not None
        cls = inner
    return cls


def _summary(cls: type) -> list[str]:
    text = inspect.getdoc(cls) or ""
    return [] if text.startswith(f"{cls.__name__}(") else [prose(text)]  # dataclass's own


def _dataclass_in(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a hint names, if it does, and whether it is a list of it."""
    hint = without_null(hint)
    is_list = typing.get_origin(hint) is list
    inner = typing.get_args(hint)[0] if is_list else hint
    return (inner if dataclasses.is_dataclass(inner) else None), is_list  # type: ignore[return-value]


def _kind(hint: Any) -> str:
    bare = without_null(hint)
    inner = typing.get_args(bare)
    if typing.get_origin(bare) is list:
        words = "list of mappings" if dataclasses.is_dataclass(inner[0]) else _list_of(inner[0])
    elif typing.get_origin(bare) in (types.UnionType, typing.Union):
        words = " or ".join(_kind(arg) for arg in inner)
    else:
        words = _TYPES.get(bare, getattr(bare, "__name__", str(bare)))
    return words if bare is hint else f"{words} or null"


def _list_of(inner: Any) -> str:
    words = _kind(inner)
    return f"list of {words}" if inner is bool or words.startswith("list") else f"list of {words}s"


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return _as_yaml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _as_yaml(field.default_factory())
    return "none: it must be set"


def _as_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value else "0"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _published() -> dict[str, list[str]]:
    """What the paper says about keys: ``paper: 32 (7B), 48 (34B); source``."""
    found: dict[str, list[str]] = {}
    for recipe, words in zip((paper.PRETRAINING, paper.FINE_TUNING), _STAGES.values(), strict=True):
        for key, value in recipe.items():
            if recipe is paper.FINE_TUNING and paper.PRETRAINING.get(key) == value:
                continue
            small, large = (_number(value.of(size)) for size in paper.SIZES)
            text = small if small == large else f"{small} (7B), {large} (34B)"
            entry = f"{words}: {text}, {value.source.removeprefix('paper, ')}"
            keys = (
                [f"data.{stage}.image_first" for stage in ("stage1", "stage2")]
                if key == "data.image_first"
                else [key]
            )
            for one in keys:
                found.setdefault(one, []).append(entry)
    return found


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
