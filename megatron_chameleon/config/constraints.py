"""What a single value of a config must be, written at its field.

    lr: PositiveFloat = 1e-4
    norm_order: Annotated[str, OneOf("pre", "swin")] = "pre"

``find_violations`` walks through a config and reports every value that breaks its constraint.
Combinations of values are the subject of ``checks/``.
"""

import dataclasses
import functools
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_chameleon.errors import ConfigError


class Constraint(ABC):
    """A condition on one value. ``str`` ends a sentence that begins "it must be ..."."""

    @abstractmethod
    def allows(self, value: Any) -> bool:
        """Whether a value, which is not null, meets the condition."""

    @property
    def remedy(self) -> str:
        """What to do about a value that does not, without a full stop."""
        return f"Use a number {self}"


@dataclass(frozen=True)
class Above(Constraint):
    """A number greater than ``low``."""

    low: float

    def allows(self, value: float) -> bool:
        return value > self.low

    def __str__(self) -> str:
        return f"above {self.low}"


@dataclass(frozen=True)
class AtLeast(Constraint):
    """A number that is ``low`` or greater."""

    low: float

    def allows(self, value: float) -> bool:
        return value >= self.low

    @property
    def remedy(self) -> str:
        return f"Use {self}"

    def __str__(self) -> str:
        return f"{self.low} or more"


@dataclass(frozen=True)
class Between(Constraint):
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"between {self.low} and {self.high}"


class OneOf(Constraint):
    """One of a few values."""

    def __init__(self, *choices: str | int) -> None:
        self.choices = choices

    def allows(self, value: str | int) -> bool:
        return value in self.choices

    @property
    def remedy(self) -> str:
        return "Choose one of them"

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]


def find_violations(config: Any, key: str = "") -> Iterator[ConfigError]:
    """Every value that breaks the constraint at its field, in the order of the fields.

    Args:
        config: A dataclass of scalars, of dataclasses and of lists of both.
        key: Where ``config`` stands in the whole config, such as ``data.stage1[0]``.
    """
    if isinstance(config, list):
        for index, item in enumerate(config):
            yield from find_violations(item, f"{key}[{index}]")
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return
    constraints = field_constraints(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{key}.{field.name}".lstrip("."), getattr(config, field.name)
        constraint, is_nullable = constraints.get(field.name, (None, True))
        if constraint and not (is_nullable and value is None) and not constraint.allows(value):
            remedy = constraint.remedy + (", or null" if is_nullable else "")
            yield ConfigError(name, f"{value!r} is not {constraint}", remedy)
        yield from find_violations(value, name)


@functools.cache
def field_constraints(cls: type) -> dict[str, tuple[Constraint, bool]]:
    """For each field of a dataclass that has a constraint: it, and whether null is allowed too."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: (constraint, hint is not bare)
        for name, hint in hints.items()
        for bare in [without_null(hint)]
        for constraint in getattr(bare, "__metadata__", ())
        if isinstance(constraint, Constraint)
    }


def without_null(hint: Any) -> Any:
    """``T`` of the type hint ``T | None``; any other hint as it is."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    others = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return others[0] if len(others) == 1 else hint
