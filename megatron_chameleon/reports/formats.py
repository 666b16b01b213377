"""Numbers as a report writes them."""

import math
from typing import Any

from megatron_chameleon.pages.axes import tick_label
from megatron_chameleon.wording import format_duration, shown

NONE = "–"


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash if there is none."""
    return NONE if value is None or not math.isfinite(value) else format(value, form)


def amount(value: float | None) -> str:
    """A count in a few characters, such as 2.87M, or a dash."""
    return NONE if value is None or not math.isfinite(value) else tick_label(float(f"{value:.3g}"))


def duration(seconds: float | None) -> str:
    """A duration, or a dash."""
    return NONE if seconds is None or not math.isfinite(seconds) else format_duration(seconds)


def setting(value: Any) -> str:
    """A value of a config as YAML writes it, cut if it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value and len(value) <= 200 else shown(value)
