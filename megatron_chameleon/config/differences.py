"""Find the values in which two configs differ."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_chameleon.config.schema import Config
from megatron_chameleon.masking import masked_values

ABSENT = "(absent)"


def find_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The old and the new value of each key that differs, in the order of the schema.

    Keys are written ``section.key``, or ``data.stage1[2].prefix`` in lists of sections; a list of
    numbers or words is one value. Where one config lacks an entry or a list that the other has, its
    values are ``(absent)``. Secrets are masked, as they are in a config that was kept, so a secret
    that was replaced by another one is no difference.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    }


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _flatten(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, list) and all(map(dataclasses.is_dataclass, value)):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{key}[{index}]")
    else:
        yield key, masked_values(value, key.rpartition(".")[2])
