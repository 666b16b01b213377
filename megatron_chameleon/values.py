"""Check the values that a file states, one by one, before anything is built from them.

    values = Values(read_json_object(file), str(file), "Use a complete config.json")
    layers = values.whole("num_hidden_layers", low=1)

A file that someone else wrote may say anything: -1 heads, 10^18 columns, "nan", a list in place of
an object. Each value is taken with its type and its range, and a wrong one is an error that names
it.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_chameleon.errors import ChameleonError, CheckpointError
from megatron_chameleon.wording import shown

LARGEST_SIZE = 2**24
"""Most columns, heads, tokens and the like: a hundred times those of the largest models. Two such
numbers multiplied are still far from what 64 bits hold."""
LARGEST_COUNT = 2**53
"""Most steps, tokens and the like: larger numbers are not exact in JSON."""
_REQUIRED: Any = object()


def describe(value: Any) -> str:
    """A value for a message: short, in one line, and quick whatever it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return shown(value)
    names: dict[type, str] = {dict: "an object", list: "a list", tuple: "a tuple", bytes: "bytes"}
    return names.get(type(value)) or f"a {type(value).__name__}"


def printable(name: str) -> str:
    """A name for a message, in one line of a readable length."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


class Values:
    """The values of an object in a file.

    Args:
        content: The object; keys may be of any type.
        where: The file, and the place in it, that errors name.
        remedy: What to do about a wrong value.
        kind: The class of the errors.

    A method with a ``default`` returns it where the key is missing or its value is null. Without
    one, such a key is an error.
    """

    def __init__(
        self,
        content: Mapping[Any, Any],
        where: str,
        remedy: str,
        kind: type[ChameleonError] = CheckpointError,
    ) -> None:
        self.content = content
        self.where = where
        self._remedy = remedy
        self._kind = kind

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def whole(
        self, key: str, low: int = 0, high: int = LARGEST_SIZE, default: Any = _REQUIRED
    ) -> Any:
        """A whole number from ``low`` to ``high``, both included.

        Raises:
            ChameleonError: It is missing, of another type or out of the range.
        """
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(
                f"{key} is {describe(value)}, not a whole number from {low:,} to {high:,}"
            )
        return value

    def number(
        self, key: str, low: float = 0.0, high: float = 1e9, default: Any = _REQUIRED
    ) -> Any:
        """A finite number from ``low`` to ``high``, both included, as a float.

        Raises:
            ChameleonError: It is missing, of another type or out of the range.
        """
        value = self._get(key, default)
        if value is default:
            return value
        found = value
        if isinstance(value, str) and len(value) < 40:  # YAML 1.1 reads 1e-5 as a string
            try:
                found = float(value)
            except ValueError:
                found = math.nan
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not low <= found <= high:
            raise self.error(f"{key} is {describe(value)}, not a number from {low:g} to {high:g}")
        return float(found)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false.

        Raises:
            ChameleonError: It is missing or of another type.
        """
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(f"{key} is {describe(value)}, not true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED, longest: int = 4096) -> Any:
        """A string.

        Raises:
            ChameleonError: It is missing, of another type or longer.
        """
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.error(f"{key} is {describe(value)}, not a string")
        if len(value) > longest:
            raise self.error(f"{key} has {len(value):,} characters, more than {longest:,}")
        return value

    def wholes(
        self, key: str, low: int = 0, high: int = LARGEST_SIZE, most: int = 10**6
    ) -> list[int]:
        """A list of at most ``most`` whole numbers; an empty one where it is missing.

        Raises:
            ChameleonError: It is of another type, too long, or an element is out of the range.
        """
        value = self._get(key, ())
        if not isinstance(value, list | tuple) or len(value) > most:
            what = describe(value) if not isinstance(value, list) else f"a list of {len(value):,}"
            raise self.error(f"{key} is {what}, not a list of at most {most:,} whole numbers")
        for index, number in enumerate(value):
            if type(number) is not int or not low <= number <= high:
                what = f"{key}[{index}] is {describe(number)}, not a whole number"
                raise self.error(f"{what} from {low:,} to {high:,}")
        return list(value)

    def section(self, key: str, default: Any = _REQUIRED) -> "Values":
        """An object inside this one.

        Raises:
            ChameleonError: It is missing or of another type.
        """
        value = self._get(key, default)
        if not isinstance(value, Mapping):
            raise self.error(f"{key} is {describe(value)}, not an object")
        return Values(value, f"{self.where}: {key}", self._remedy, self._kind)

    def like(self, content: Mapping[Any, Any]) -> "Values":
        """Other values of the same place, for errors like those of these."""
        return Values(content, self.where, self._remedy, self._kind)

    def error(self, what: str) -> ChameleonError:
        """The error to raise about a value of this object."""
        return self._kind(self.where, what, self._remedy)

    def _get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None:
            if default is _REQUIRED:
                state = "null" if key in self.content else "missing"
                raise self.error(f"{key} is {state}")
            return default
        return value
