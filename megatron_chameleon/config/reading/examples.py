"""Right values to show in the error of a wrong list or mapping, made from the type of the key."""

import dataclasses
import typing
from typing import Any

import yaml

_OF_SCALARS: dict[type, list[Any]] = {int: [10, 20], float: [0.5, 1.0], bool: [True, False]}

_OF_KEYS = {
    "training.rampup_batch_size": [8, 8, 10000],
    "training.profile_steps": [10, 12],
}
"""Lists whose entries have a meaning each."""


def example(hint: Any, key: str, value: Any, default: Any = dataclasses.MISSING) -> str:
    """A right value in YAML, with what the user wrote where that fits.

    Args:
        hint: The type of the key: a dataclass, or a list.
        key: In full.
        value: What the user wrote in its place.
        default: A function that gives the key's default, if it has one.

    Returns:
        Such as ``[{prefix: tokens/a}]``.
    """
    found = _OF_KEYS.get(key) or _example(hint, value, default)
    text = yaml.safe_dump(found, default_flow_style=True, width=10**6)
    return text.strip()


def _example(hint: Any, value: Any, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _of_mapping(hint, value)
    item = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(item):
        return [_of_mapping(item, value)]
    usual = default() if callable(default) else []
    if usual:  # only some texts are allowed
        return usual[:2]
    if isinstance(value, item) and not isinstance(value, bool):
        return [value]
    return _OF_SCALARS.get(item, ["first", "second"])


def _of_mapping(cls: Any, value: Any) -> Any:
    hints = typing.get_type_hints(cls)
    if isinstance(value, dict) and value.keys() & hints.keys():
        return {name: one for name, one in value.items() if name in hints}
    first = dataclasses.fields(cls)[0]
    kind = hints[first.name]
    if typing.get_origin(kind) is list:
        return {first.name: _example(kind, value, first.default_factory)}
    if kind is str:
        return {first.name: value if isinstance(value, str) and value else "..."}
    usual = first.default
    return {first.name: usual if isinstance(usual, int | float | str) else "..."}
