"""Turn the plain values of a YAML file into dataclasses, and report everything that does not fit.

OmegaConf's structured configs do this too, but stop at the first mistake. Here all mistakes are
reported at once, each unknown key with the nearest name.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.config.reading.examples import example
from megatron_chameleon.wording import cut, shown

_NAMES = {int: "a whole number", float: "a number", str: "a string", type(None): "null"}
_NO_DEFAULT = dataclasses.MISSING
_OTHER_NAMES = {
    "prefix": ("path", "paths", "file", "files", "data", "data_path", "dataset", "name"),
}
"""What people write for a key whose name resembles none of them."""


@dataclass(frozen=True)
class Mistake:
    """A key that is unknown, or whose value has the wrong type."""

    key: str
    """The key in full, such as ``data.stage1[0].prefix``; "top level" for the whole file."""
    what: str
    remedy: str
    names_key: bool = True
    """Whether ``what`` is a sentence that names the key itself."""


class Builder:
    """Builds dataclasses, and collects in ``mistakes`` what is wrong with their values."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def build(self, cls: type, values: Any, key: str = "") -> Any:
        """An instance of a dataclass.

        Args:
            cls: A dataclass of dataclasses, lists and scalars.
            values: A mapping by the names of its fields, or None for the defaults.
            key: Where it stands in the file; empty for the whole file.
        """
        if not isinstance(values, dict):
            if values is not None:
                remedy = "Write its keys indented below it"
                if key:
                    remedy = f"Write it as {example(cls, key, values)}"
                self._wrong_type(key or "top level", "a mapping", values, remedy)
            return cls()
        hints = typing.get_type_hints(cls)
        defaults = {
            field.name: field.default_factory if field.default is _NO_DEFAULT else field.default
            for field in dataclasses.fields(cls)
        }
        known = {}
        for name, value in values.items():
            full = f"{key}.{cut(str(name))}".lstrip(".")
            if name in hints:
                known[name] = self._convert(hints[name], value, full, defaults[name])
            else:
                self._unknown_key(full, str(name), list(hints))
        return cls(**known)

    def _convert(
        self, hint: Any, value: Any, key: str, default: Any = _NO_DEFAULT, remedy: str = ""
    ) -> Any:
        """``value`` as ``hint`` says: a dataclass, a list, or a scalar that may be optional.

        Args:
            hint: The type of the key.
            value: As read.
            key: In full.
            default: Of the key.
            remedy: What to do about a scalar of the wrong type; empty: the usual.
        """
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            return self.build(hint, value, key)
        if typing.get_origin(hint) is list:
            if not isinstance(value, list):
                whole = f"Write it as {example(hint, key, value, default)}"
                self._wrong_type(key, "a list", value, whole)
                return []
            item = typing.get_args(hint)[0]
            whole = f"Write the list as {example(hint, key, value, default)}"
            return [
                self._convert(item, one, f"{key}[{place}]", remedy=whole)
                for place, one in enumerate(value)
            ]
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        allowed = typing.get_args(hint) if is_union else (hint,)
        converted = _convert_number(value, allowed)
        if type(converted) not in allowed:
            usual = "Correct the value"
            if default not in (_NO_DEFAULT, "") and not callable(default):
                usual += f", or remove it to use the default, {json.dumps(default)}"
            self._wrong_type(key, _name_types(allowed), value, remedy or usual)
        return converted

    def _unknown_key(self, key: str, name: str, known: list[str]) -> None:
        section = key.removesuffix(cut(name))
        near = [one for one, others in _OTHER_NAMES.items() if name in others and one in known]
        near = near or difflib.get_close_matches(name[:60], known, n=1, cutoff=0.4)
        remedy = f"Did you mean `{section}{near[0]}`?" if near else f"Use one of {', '.join(known)}"
        self.mistakes.append(Mistake(key, "Unknown key", remedy, names_key=False))

    def _wrong_type(self, key: str, wanted: str, value: Any, remedy: str) -> None:
        self.mistakes.append(Mistake(key, f"{key} must be {wanted} (got {shown(value)})", remedy))


def _convert_number(value: Any, allowed: tuple[type, ...]) -> Any:
    """A number as the wanted type, if nothing is lost by it; any other value as it is."""
    if float in allowed and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            return math.inf if value > 0 else -math.inf
    if float in allowed and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    if int in allowed and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _name_types(allowed: tuple[type, ...]) -> str:
    """``true, false or a whole number``."""
    names: list[str] = []
    for kind in allowed:
        names += ["true", "false"] if kind is bool else [_NAMES[kind]]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
