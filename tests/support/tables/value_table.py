"""Every option of every verb and every key of every config, and the values to try them with.

The table is read from the parsers and from the dataclasses, so that a new option or key is in it by
itself.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.cli.main import VERBS, build_parser
from megatron_chameleon.cli.options import NumberOption
from megatron_chameleon.config.constraints import (
    Above,
    Below,
    Between,
    Constraint,
    Repeats,
    Within,
    ZeroOr,
)

VALUES = ("0", "-1", "1e30", "nan", "inf", "word", "1" + 30 * "0", str(2**63), str(2**31))
NUMBERS = (int, float)


@dataclass(frozen=True)
class Option:
    """An option or argument that takes a value."""

    verb: tuple[str, ...]
    """Such as ("tokenizer", "text")."""
    action: argparse.Action

    @property
    def name(self) -> str:
        """``--gpus``, or the name of an argument."""
        strings = self.action.option_strings
        return strings[-1] if strings else str(self.action.metavar or self.action.dest)

    @property
    def is_number(self) -> bool:
        return isinstance(self.action.type, NumberOption)

    def __str__(self) -> str:
        return f"{' '.join(self.verb)} {self.name}"


def parsers() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The parser of every verb that has no actions, and of every action of the others."""
    for verb in VERBS:
        (subparsers,) = _subparsers(build_parser(verb))
        yield from _leaves((verb,), subparsers.choices[verb])


def _leaves(
    words: tuple[str, ...], parser: argparse.ArgumentParser
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    inner = _subparsers(parser)
    if not inner:
        yield words, parser
    for subparsers in inner:
        for name, subparser in subparsers.choices.items():
            yield from _leaves((*words, name), subparser)


def _subparsers(parser: argparse.ArgumentParser) -> list[Any]:
    return [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]


def options() -> list[Option]:
    """Every option and argument that takes a value."""
    return [
        Option(words, action)
        for words, parser in parsers()
        for action in parser._actions
        if action.nargs != 0
    ]


def config_keys(cls: type, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config with the type hint of its field; of lists, the first entry's keys."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        full = f"{key}.{name}".lstrip(".")
        entry = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if dataclasses.is_dataclass(entry):
            assert isinstance(entry, type)
            yield from config_keys(entry, full if entry is hint else f"{full}[0]")
        else:
            yield full, hint


def scalar_types(hint: Any) -> set[type]:
    """The types that a field's value, or an entry of its list, may have."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated or origin is list:
        return scalar_types(typing.get_args(hint)[0])
    if origin in (types.UnionType, typing.Union):
        return set().union(*map(scalar_types, typing.get_args(hint)))
    return {hint}


def ends(constraint: Constraint) -> list[str]:
    """The smallest and the largest number that a constraint allows, as a user would write them."""
    match constraint:
        case Between(low=low, high=high) | ZeroOr(low=low, high=high):
            return [str(low), str(high)]
        case Above(low=low, at_most=high):
            return [str(low + 1e-30), str(high)]
        case Below(low=low, high=high):
            return [str(low), str(high - 1e-9)]
        case Within(low=low, high=high):
            return [str(low + 1e-30), str(high - 1e-9)]
        case Repeats(most=most):
            return ["1", str(most)]
    return []
