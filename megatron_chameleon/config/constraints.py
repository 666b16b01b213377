"""What a single value must be, written at its field.

    lr: Annotated[float, Above(0, at_most=1e6)] = 1e-4
    norm_order: Annotated[str, OneOf("pre", "swin")] = "pre"

``find_violations`` walks through a config and reports every value that breaks its constraint.
Combinations of values are the subject of ``checks/``. The options of the command line use the same
constraints (``cli/options.py``).

Every constraint of a number has two ends, so no infinite value and no NaN passes any of them. An
upper end is far above what anyone needs. It keeps out typing errors that would fill the memory or
overflow somewhere in a library, where nobody would find the cause.
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
from megatron_chameleon.wording import shown


class Constraint(ABC):
    """A condition on one value. ``str`` ends a sentence that begins "it must be ..."."""

    remedy = "Use a number in that range"
    """What to do about a value that does not meet it, without a full stop."""

    @abstractmethod
    def allows(self, value: Any) -> bool:
        """Whether a value, which is not null, meets the condition."""


@dataclass(frozen=True)
class Between(Constraint):
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float
    remedy: str = Constraint.remedy

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"between {_number(self.low)} and {_number(self.high)}"


@dataclass(frozen=True)
class Above(Constraint):
    """A number greater than ``low``, up to and including ``at_most``."""

    low: float
    at_most: float

    def allows(self, value: float) -> bool:
        return self.low < value <= self.at_most

    def __str__(self) -> str:
        return f"above {_number(self.low)} and at most {_number(self.at_most)}"


@dataclass(frozen=True)
class Below(Constraint):
    """A number from ``low``, which is included, to ``high``, which is not."""

    low: float
    high: float

    def allows(self, value: float) -> bool:
        return self.low <= value < self.high

    def __str__(self) -> str:
        return f"{_number(self.low)} or more and below {_number(self.high)}"


@dataclass(frozen=True)
class Within(Constraint):
    """A number between ``low`` and ``high``, neither included."""

    low: float
    high: float

    def allows(self, value: float) -> bool:
        return self.low < value < self.high

    def __str__(self) -> str:
        return f"above {_number(self.low)} and below {_number(self.high)}"


@dataclass(frozen=True)
class ZeroOr(Constraint):
    """0, or a number from ``low`` to ``high``, both included."""

    low: float
    high: float

    def allows(self, value: float) -> bool:
        return value == 0 or self.low <= value <= self.high

    def __str__(self) -> str:
        return f"0 or between {_number(self.low)} and {_number(self.high)}"


@dataclass(frozen=True)
class Repeats(Constraint):
    """true, false, or a number of times from 1 to ``most``."""

    most: int
    remedy = "Use true, false or a number in that range"

    def allows(self, value: bool | int) -> bool:
        return isinstance(value, bool) or 1 <= value <= self.most

    def __str__(self) -> str:
        return f"true, false or a number between 1 and {_number(self.most)}"


class OneOf(Constraint):
    """One of a few values."""

    remedy = "Choose one of them"

    def __init__(self, *choices: str | int) -> None:
        self.choices = choices

    def allows(self, value: str | int) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


@dataclass(frozen=True)
class Text(Constraint):
    """Valid Unicode of a limited length.

    Args:
        longest: Characters.
        lines: Whether line breaks and tabs are allowed. A path or a name has none.
    """

    longest: int
    lines: bool = False

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return "Write it without them"

    def allows(self, value: str) -> bool:
        if len(value) > self.longest:
            return False
        plain = value.translate({ord(c): None for c in "\n\r\t"}) if self.lines else value
        is_plain = all(ord(c) >= 32 and not 127 <= ord(c) < 160 for c in plain)
        return is_plain and not any(0xD800 <= ord(c) < 0xE000 for c in value)

    def __str__(self) -> str:
        return f"a text of at most {self.longest:,} characters, none of them a control character"


PositiveInt = Annotated[int, Between(1, 10**9)]
NonNegativeInt = Annotated[int, Between(0, 10**9)]
Share = Annotated[float, Between(0, 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
PathText = Annotated[str, Text(4096)]


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
        if constraint and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _check_value(f"{name}[{index}]", item, constraint, is_nullable)
        elif constraint:
            yield from _check_value(name, value, constraint, is_nullable)
        yield from find_violations(value, name)


def _check_value(
    name: str, value: Any, constraint: Constraint, is_nullable: bool
) -> Iterator[ConfigError]:
    if is_nullable if value is None else constraint.allows(value):
        return
    remedy = constraint.remedy + (", or null" if is_nullable else "")
    yield ConfigError(name, f"{shown(value)} is not {constraint}", remedy)


@functools.cache
def field_constraints(cls: type) -> dict[str, tuple[Constraint, bool]]:
    """For each field of a dataclass that has a constraint: it, and whether null is allowed too.

    The constraint of a list's field is that of its entries.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: (constraint, hint is not bare)
        for name, hint in hints.items()
        for bare in [without_null(hint)]
        for constraint in getattr(_entry(bare), "__metadata__", ())
        if isinstance(constraint, Constraint)
    }


def without_null(hint: Any) -> Any:
    """``T`` of the type hint ``T | None``; any other hint as it is."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    others = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return others[0] if len(others) == 1 else hint


def _entry(hint: Any) -> Any:
    """``T`` of the type hint ``list[T]``; any other hint as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def _number(value: float) -> str:
    """``1,000,000`` or ``1e-30``."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:g}"
