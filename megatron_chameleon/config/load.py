"""Read a config: defaults < preset < YAML file < ``section.key=value``.

A file's section ``variables`` may define values of your own, to be used as ``${variables.name}``.
OmegaConf reads the YAML, the overrides and ``${...}``. ``reading/build.py`` turns the result into
the dataclasses of ``schema.py`` and finds every unknown key and every value of the wrong type at
once.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf

from megatron_chameleon.config.constraints import find_violations
from megatron_chameleon.config.names import PRESETS, preset_names
from megatron_chameleon.config.reading.build import Builder, Mistake
from megatron_chameleon.config.reading.interpolation import check_interpolation, unresolved
from megatron_chameleon.config.reading.overrides import Override, apply_overrides, parse_overrides
from megatron_chameleon.config.reading.yaml_file import ERRORS, read_yaml
from megatron_chameleon.config.run_length import settle_run_length
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError, ConfigErrors, first_line
from megatron_chameleon.masking import masked_values
from megatron_chameleon.wording import shown

T = TypeVar("T")

_RESOLVER = re.compile(r"\$\{[^}]*:[^}]*\}?")
LISTED = 20
"""Mistakes of one config that are reported."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), inherited: Mapping[str, Any] | None = None
) -> Config:
    """Read a training config.

    Args:
        path: A YAML file. Its key ``preset`` may name a file of ``presets/``, whose values then
            apply wherever the file itself sets none.
        overrides: Words of the form ``section.key=value``, the value in YAML. An entry of a list is
            ``data.stage1[0].weight=2``.
        inherited: Values by section and key that apply wherever neither the file and its preset nor
            an override sets one.

    Raises:
        ConfigError: The file, the preset or an override cannot be read.
        ConfigErrors: Keys are unknown, or values have the wrong type.
    """
    path = Path(path)
    own, words = read_yaml(path), parse_overrides(overrides)
    layers = [own]
    if (preset := _preset_of(own, words)) is not None:
        where = _origin("preset", f"{path}: preset", words)
        layers.insert(0, read_yaml(_preset_path(preset, where)))
    if inherited:
        layers.insert(0, OmegaConf.create(dict(inherited)))
    words += settle_run_length(layers, words)
    return _resolve(Config, layers, str(path), words)


def replace_values(config: Config, overrides: Sequence[str]) -> Config:
    """The config with the values of overrides, as ``load_config`` takes them.

    Raises:
        ConfigErrors: Keys are unknown, or values have the wrong type.
    """
    if not overrides:
        return config
    layers = [OmegaConf.create(dataclasses.asdict(config))]
    words = parse_overrides(overrides)
    words += settle_run_length(layers, words)
    return _resolve(Config, layers, "config", words)


def load_recorded_config(path: Path) -> Config:
    """Read a config that came with a checkpoint, which somebody else may have written.

    Its values are taken as they stand. ``${...}`` is not replaced: a run saves its config with all
    values replaced, and a resolver such as ``${oc.env:NAME}`` would read this machine's secrets.

    Raises:
        ConfigError: The file cannot be read, asks for a resolver, or has a model's setting that is
            out of its bounds.
        ConfigErrors: Keys are unknown, or values have the wrong type.
    """
    own = read_yaml(path)
    if resolver := _find_resolver(unresolved(own)):
        what = f"has {shown(resolver)}, and a checkpoint's config may not ask for a resolver"
        raise ConfigError(str(path), what, "Write the value itself")
    layers = [own]
    if (preset := _preset_of(own, ())) is not None:
        layers.insert(0, read_yaml(_preset_path(preset, f"{path}: preset")))
    config = _resolve(Config, layers, str(path), (), replace=False)
    if config.data.reset_attention is None:  # earlier versions did not isolate by themselves
        config.data.reset_attention = False
    for violation in find_violations(config.model, "model"):
        raise ConfigError(f"{path}: {violation.where}", violation.what, "Restore the file")
    return config


def _find_resolver(value: Any) -> str | None:
    """The first ``${name:...}`` among the values."""
    if isinstance(value, str):
        found = _RESOLVER.search(value)
        return found[0] if found else None
    entries = value.values() if isinstance(value, dict) else value
    nested = (_find_resolver(entry) for entry in entries) if isinstance(value, dict | list) else ()
    return next(filter(None, nested), None)


def find_preset(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """The name of the preset that a config builds on, or that it is itself; None without one."""
    preset = _preset_of(read_yaml(path), parse_overrides(overrides))
    if preset is not None:
        return str(preset)
    return path.stem if path.parent == PRESETS else None


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
    return _resolve(cls, [read_yaml(path)], str(path), parse_overrides(overrides))


def _resolve(
    cls: type[T],
    layers: Sequence[DictConfig],
    where: str,
    overrides: Sequence[Override],
    *,
    replace: bool = True,
) -> T:
    """The dataclass of all layers merged, a later one wins, and then changed by the overrides.

    Args:
        cls: The dataclass.
        layers: What is merged.
        where: For errors.
        overrides: Applied last.
        replace: Whether ``${...}`` is replaced.
    """
    try:
        merged = OmegaConf.merge(*layers)
        assert isinstance(merged, DictConfig)
    except ERRORS as error:
        raise ConfigError(where, first_line(error), "Correct that value") from error
    apply_overrides(merged, overrides)
    check_interpolation(merged, where)
    try:
        values = OmegaConf.to_container(merged, resolve=replace)
    except ERRORS as error:
        key = str(getattr(error, "full_key", None) or "")
        what = f"{key}: {first_line(error)}" if key else first_line(error)
        place = _origin(key, where, overrides)
        raise ConfigError(place, what[:400], "Correct that value") from error
    assert isinstance(values, dict)
    for key in ("preset", "variables"):
        values.pop(key, None)
    builder = Builder()
    config = builder.build(cls, values)
    if builder.mistakes:
        problems = [_locate(found, where, overrides) for found in builder.mistakes[:LISTED]]
        if (more := len(builder.mistakes) - LISTED) > 0:
            problems.append(ConfigError(where, f"{more} more mistakes", "Is it a config file?"))
        raise ConfigErrors(problems)
    assert isinstance(config, cls)
    return config


def _locate(mistake: Mistake, where: str, overrides: Sequence[Override]) -> ConfigError:
    """The mistake with the override that caused it, if one did, or with the file."""
    place = _origin(mistake.key, "", overrides)
    if not mistake.names_key and not place.startswith(mistake.key):
        place = f"{place or where}: {mistake.key}"  # it lies within what the override has set
    place = place or where
    return ConfigError(place, mistake.what, mistake.remedy)


def _origin(key: str, where: str, overrides: Sequence[Override]) -> str:
    """The last override that set a key, or something above or below it; else ``where``."""
    return next((str(word) for word in reversed(overrides) if key and word.concerns(key)), where)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(format_config(config), encoding="utf-8")


def format_config(config: Config) -> str:
    """The resolved config as YAML text, in the order of the schema."""
    return yaml.safe_dump(masked_values(dataclasses.asdict(config)), sort_keys=False)


def _preset_of(own: DictConfig, overrides: Sequence[Override]) -> object:
    """What the key ``preset`` says; None if it is absent or null."""
    layer = OmegaConf.create({"preset": unresolved(own).get("preset")})
    apply_overrides(layer, [word for word in overrides if word.key == "preset"])
    # Not resolved: ${...} may stand for a value of the file that the preset is a part of.
    return unresolved(layer)["preset"]


def _preset_path(name: object, where: str) -> Path:
    names = preset_names(PRESETS)
    if name not in names:
        what = f"no preset is called {shown(name)}"
        remedy = f"Use one of: {', '.join(names)}"
        raise ConfigError(where, what, remedy)
    return PRESETS / f"{name}.yaml"
