"""Read a config: defaults < preset < YAML file < ``section.key=value``.

A file's section ``variables`` may hold values of one's own, to be used as ``${variables.name}``.
OmegaConf reads the YAML, the overrides and ``${...}``; this file turns the result into the
dataclasses of ``schema.py`` and reports every unknown key and every value of a wrong type at once,
each with the nearest name.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, ConfigErrors, first_line

T = TypeVar("T")

PRESETS = Path(__file__).parent / "presets"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a training config.

    Args:
        path: A YAML file. Its key ``preset`` may name a file of ``presets/`` that lies underneath.
        overrides: Words of the form ``section.key=value``, the value in YAML.

    Raises:
        ConfigError: The file, the preset or an override cannot be read.
        ConfigErrors: One or more keys are unknown or values are of a wrong type.
    """
    path = Path(path)
    own, words = read_yaml(path), _read_overrides(overrides)
    preset = words.get("preset", own.get("preset"))
    layers = [own, words]
    if preset is not None:
        layers.insert(0, read_yaml(_preset_path(str(preset), where=str(path))))
    return _resolve(Config, layers, str(path), overrides)


def find_config(name: str | Path) -> Path:
    """The path of a config: ``name`` itself, or the preset that is called so.

    Raises:
        ConfigError: It is neither.
    """
    path, preset = Path(name), PRESETS / f"{name}.yaml"
    if path.is_file():
        return path
    if not preset.is_file():
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        remedy = f"Give the path of a YAML file, or a preset: {names}"
        raise ConfigError(str(name), "no such config file", remedy)
    return preset


def find_preset(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """The name of the preset that lies under a config, or that it is; None for none."""
    own = path.stem if path.parent == PRESETS else None
    preset = _read_overrides(overrides).get("preset", read_yaml(path).get("preset", own))
    return None if preset is None else str(preset)


def load_dataclass(cls: type[T], path: Path, overrides: Sequence[str]) -> T:
    """Read a YAML file, and overrides over it, into a dataclass.

    Args:
        cls: A dataclass of dataclasses, lists and scalars.
        path: A YAML file.
        overrides: Words of the form ``section.key=value``.

    Raises:
        ConfigError: The file or an override cannot be read.
        ConfigErrors: One or more keys are unknown or values are of a wrong type.
    """
    return _resolve(cls, [read_yaml(path), _read_overrides(overrides)], str(path), overrides)


def _resolve(cls: type[T], layers: Sequence[DictConfig], where: str, overrides: Sequence[str]) -> T:
    """The dataclass of all layers, each over those before it; the last are the overrides."""
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(where, first_line(error), "Correct that value") from error
    assert isinstance(merged, dict)
    for key in ("preset", "variables"):
        merged.pop(key, None)
    problems: list[ConfigError] = []
    config = _build(cls, merged, "", where, problems)
    if problems:
        raise ConfigErrors([_name_override(problem, where, overrides) for problem in problems])
    assert isinstance(config, cls)
    return config


def _name_override(problem: ConfigError, where: str, overrides: Sequence[str]) -> ConfigError:
    """The problem with the override that caused it, if one did, in place of file and key."""
    key = problem.where.removeprefix(f"{where}: ")
    for word in overrides:
        if f"{word.partition('=')[0]}.".startswith(f"{key}."):
            return ConfigError(word, problem.what, problem.remedy)
    return problem


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(format_config(config), encoding="utf-8")


def format_config(config: Config) -> str:
    """The resolved config as YAML text, in the order of the schema."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(path: Path) -> DictConfig:
    """A YAML file whose top level is a mapping.

    Raises:
        ConfigError: It is not there, no YAML or no mapping.
    """
    if not path.is_file():
        raise ConfigError(str(path), "no such config file", "Give the path of a YAML file")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = f"not valid YAML ({getattr(error, 'problem', None) or first_line(error)})"
        raise ConfigError(where, what, "Correct that line") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(str(path), "the top level is not a mapping", "Write sections with keys")
    return loaded


def _read_overrides(words: Sequence[str]) -> DictConfig:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip() or " " in key:
            raise ConfigError(
                word, "not of the form section.key=value", "Write for example training.steps=100"
            )
    try:
        return OmegaConf.from_dotlist(list(words))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(
            " ".join(words), f"not valid overrides ({first_line(error)})", "Quote the value"
        ) from error


def _preset_path(name: str, where: str) -> Path:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise ConfigError(
            f"{where}: preset", f"no preset is called {name!r}", f"Use one of: {', '.join(names)}"
        )
    return path


def _build(cls: type, values: Any, prefix: str, where: str, problems: list[ConfigError]) -> Any:
    """An instance of ``cls``; what is wrong with ``values`` is added to ``problems``."""
    place = f"{where}: {prefix.rstrip('.') or 'top level'}"
    if not isinstance(values, dict):
        if values is not None:
            what = f"{values!r} is not a mapping"
            problems.append(ConfigError(place, what, "Write its keys indented underneath"))
        return cls()
    hints = typing.get_type_hints(cls)
    known = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            names = f"Did you mean {near[0]}?" if near else f"The keys are {', '.join(hints)}"
            problems.append(
                ConfigError(f"{where}: {prefix}{key}", "unknown config key", names.rstrip("?"))
            )
            continue
        known[key] = _convert(hints[key], value, f"{prefix}{key}", where, problems)
    return cls(**known)


def _convert(hint: Any, value: Any, key: str, where: str, problems: list[ConfigError]) -> Any:
    """``value`` as ``hint`` says: a dataclass, a list of them, or an optional scalar."""
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, f"{key}.", where, problems)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            problems.append(ConfigError(f"{where}: {key}", f"{value!r} is no list", "Write a list"))
            return []
        item = typing.get_args(hint)[0]
        return [_convert(item, v, f"{key}[{i}]", where, problems) for i, v in enumerate(value)]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in allowed and number:
        return float(value)
    if float in allowed and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if int in allowed and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) in allowed:
        return value
    names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
    problems.append(ConfigError(f"{where}: {key}", f"{value!r} is not {names}", f"Give {names}"))
    return value
