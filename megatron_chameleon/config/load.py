"""Read a config: defaults < preset < YAML file < ``section.key=value``.

A file's section ``variables`` may define values of your own, to be used as ``${variables.name}``.
OmegaConf reads the YAML, the overrides and ``${...}``. ``build.py`` turns the result into the
dataclasses of ``schema.py`` and finds every unknown key and every value of the wrong type at once.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_chameleon.config.build import Builder, Mistake
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, ConfigErrors, first_line

T = TypeVar("T")

PRESETS = Path(__file__).parent / "presets"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a training config.

    Args:
        path: A YAML file. Its key ``preset`` may name a file of ``presets/``, whose values then
            apply wherever the file itself sets none.
        overrides: Words of the form ``section.key=value``, the value in YAML.

    Raises:
        ConfigError: The file, the preset or an override cannot be read.
        ConfigErrors: Keys are unknown, or values have the wrong type.
    """
    path = Path(path)
    own, words = read_yaml(path), _read_overrides(overrides)
    preset = words.get("preset", own.get("preset"))
    layers = [own, words]
    if preset is not None:
        layers.insert(0, read_yaml(_preset_path(str(preset), where=str(path))))
    return _resolve(Config, layers, str(path), overrides)


def find_config(name: str | Path) -> Path:
    """The path of a config: ``name`` itself if it is a file, or the preset of that name.

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
    """The name of the preset that a config builds on, or that it is itself; None without one."""
    own = path.stem if path.parent == PRESETS else None
    preset = _read_overrides(overrides).get("preset", read_yaml(path).get("preset", own))
    return None if preset is None else str(preset)


def load_dataclass(cls: type[T], path: Path, overrides: Sequence[str]) -> T:
    """Read a YAML file into a dataclass; overrides replace its values.

    Args:
        cls: A dataclass of dataclasses, lists and scalars.
        path: A YAML file.
        overrides: Words of the form ``section.key=value``.

    Raises:
        ConfigError: The file or an override cannot be read.
        ConfigErrors: Keys are unknown, or values have the wrong type.
    """
    return _resolve(cls, [read_yaml(path), _read_overrides(overrides)], str(path), overrides)


def _resolve(cls: type[T], layers: Sequence[DictConfig], where: str, overrides: Sequence[str]) -> T:
    """The dataclass of all layers merged: a later layer wins. The last one are the overrides."""
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(where, first_line(error), "Correct that value") from error
    assert isinstance(merged, dict)
    for key in ("preset", "variables"):
        merged.pop(key, None)
    builder = Builder()
    config = builder.build(cls, merged)
    if builder.mistakes:
        raise ConfigErrors([_locate(mistake, where, overrides) for mistake in builder.mistakes])
    assert isinstance(config, cls)
    return config


def _locate(mistake: Mistake, where: str, overrides: Sequence[str]) -> ConfigError:
    """The mistake with the override that caused it, if one did, or with the file."""
    place = where if mistake.names_key else f"{where}: {mistake.key}"
    for word in overrides:
        key = word.partition("=")[0]
        if f"{key}.".startswith(f"{mistake.key}.") or mistake.key.startswith(
            (f"{key}.", f"{key}[")
        ):
            place = word
            break
    return ConfigError(place, mistake.what, mistake.remedy)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(format_config(config), encoding="utf-8")


def format_config(config: Config) -> str:
    """The resolved config as YAML text, in the order of the schema."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(path: Path) -> DictConfig:
    """A YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file does not exist, is not valid YAML or is not a mapping.
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
                word, "not of the form section.key=value", "Write, for example, training.steps=100"
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
