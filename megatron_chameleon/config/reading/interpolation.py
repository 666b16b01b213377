"""How long the values of a config become when ``${...}`` is replaced, found without replacing it.

A few lines can stand for a text of any length: a value that repeats another one ten times, which
repeats a third one ten times, and so on.
"""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_chameleon.errors import ConfigError

LONGEST = 500_000
"""Characters of all replaced values together."""
COST = 20
"""Characters that each ``${...}`` counts for in addition, for the time that it takes."""
MOST_NESTED = 8
"""``${...}`` within ``${...}``, whose target is only known when it is replaced."""

_REFERENCE = re.compile(r"\$\{([\w.\[\]-]+)\}")
_NESTED = re.compile(r"\$\{[^}]*\$\{")


def check_interpolation(config: DictConfig, where: str) -> None:
    """Refuse a config whose values would become too long.

    Args:
        config: With ``${...}`` in it.
        where: For the error.

    Raises:
        ConfigError: They would.
    """
    values = unresolved(config)
    lengths = _Lengths(values)
    try:
        too_long = lengths.of(values) > LONGEST or lengths.nested > MOST_NESTED
    except RecursionError:
        too_long = True
    if too_long:
        what = f"its values repeat each other by ${{...}} to more than {LONGEST:,} characters"
        raise ConfigError(where, what, "Write the values out, or repeat less")


def unresolved(config: DictConfig) -> dict[Any, Any]:
    """The plain values of a config, ``${...}`` not replaced."""
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return values


class _Lengths:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[tuple[str, ...], int] = {}
        self.nested = 0
        """How many nested ``${...}`` have been seen."""

    def of(self, value: Any, place: tuple[str, ...] = ()) -> int:
        """Length of what ``value``, which stands at ``place``, gains by being replaced."""
        if isinstance(value, dict):
            return sum(self.of(entry, (*place, str(key))) for key, entry in value.items())
        if isinstance(value, list):
            return sum(self.of(entry, (*place, str(i))) for i, entry in enumerate(value))
        if not isinstance(value, str) or "${" not in value:
            return 0
        self.nested += len(_NESTED.findall(value))
        names = _REFERENCE.findall(value)
        return len(value) + sum(self._of_reference(name, place) for name in names)

    def _of_reference(self, name: str, place: tuple[str, ...]) -> int:
        parts = name.lstrip(".")
        dots = len(name) - len(parts)
        start = place[: len(place) - dots] if dots else ()  # one dot: the value's own mapping
        wanted = (*start, *parts.replace("[", ".").replace("]", "").split("."))
        if wanted not in self._known:
            self._known[wanted] = COST  # also ends a circle, which OmegaConf reports
            target = self._find(wanted)
            own = len(target) if isinstance(target, str) else 0
            self._known[wanted] = COST + max(own, self.of(target, wanted))
        return self._known[wanted]

    def _find(self, place: tuple[str, ...]) -> Any:
        target = self._root
        for part in place:
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                target = target.get(part) if isinstance(target, dict) else None
        return target
