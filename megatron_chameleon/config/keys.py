"""The keys of a config in full, such as ``optimizer.lr``, and the values that are easily listed."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.config.constraints import (
    OneOf,
    Repeats,
    Text,
    field_constraints,
    without_null,
)

LONGEST_PATH = 4096
"""The length by which ``PathText`` is told from other texts."""


@dataclass(frozen=True)
class Key:
    """A key, as far as a shell can complete its value."""

    values: tuple[str, ...] = ()
    """All values, or the few of many that are words, such as null."""
    is_path: bool = False
    """Whether it names a file or a folder."""


def config_keys(cls: type, above: str = "") -> dict[str, Key]:
    """Every key that ``section.key=value`` can set, but not the entries of lists.

    Args:
        cls: A dataclass of scalars, of lists and of dataclasses, such as ``Config``.
        above: The key of ``cls`` itself.
    """
    constraints = field_constraints(cls)
    found: dict[str, Key] = {}
    for name, hint in typing.get_type_hints(cls).items():
        key, kind = f"{above}.{name}".lstrip("."), without_null(hint)
        if dataclasses.is_dataclass(kind):
            found |= config_keys(typing.cast(type, kind), key)
        else:
            constraint, is_nullable = constraints.get(name, (None, kind is not hint))
            found[key] = _key(kind, constraint, is_nullable)
    return found


def _key(kind: Any, constraint: Any, is_nullable: bool) -> Key:
    if typing.get_origin(kind) is list:
        return Key(("[]",))
    values: tuple[str, ...] = ()
    if kind is bool or isinstance(constraint, Repeats):
        values = ("true", "false")
    elif isinstance(constraint, OneOf):
        values = tuple(map(str, constraint.choices))
    is_path = isinstance(constraint, Text) and constraint.longest == LONGEST_PATH
    return Key((*values, *(("null",) if is_nullable else ())), is_path)
