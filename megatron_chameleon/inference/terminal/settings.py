"""The sampling options that ``/set`` changes in the middle of a conversation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.wording import shown

NOTHING = ("none", "off", "default")
LARGEST_SEED = 2**63 - 1


def _number(text: str) -> float:
    return float(text)


def _whole(text: str) -> int:
    return int(text)


def _switch(text: str) -> bool:
    return {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}[
        text.lower()
    ]


def _stop(text: str) -> tuple[str, ...]:
    return (text.replace("\\n", "\n").replace("\\t", "\t"),)


SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (_number, "a number that is 0 or more"),
    "top_p": (_number, "a number above 0 and at most 1"),
    "top_k": (_whole, "a whole number that is 0 or more"),
    "repetition_penalty": (_number, "a number above 0"),
    "guidance": (_number, "a number that is 0 or more"),
    "guidance_image": (_number, "a number that is 0 or more, or none"),
    "max_tokens": (_whole, "a whole number above 0, or none"),
    "images": (_switch, "on or off"),
    "force": (Force, "image, text or none"),
    "size": (str, "width and height of images, such as 3:2, or none"),
    "stop": (_stop, "a text, or none"),
    "seed": (_whole, f"a whole number from 0 to {LARGEST_SEED}"),
}
"""How each option is read, and what it takes."""


def changed(options: GenerationOptions, name: str, text: str) -> GenerationOptions:
    """The options with one changed; ``none`` gives an option its default.

    Raises:
        ConfigError: There is no such option, or it does not take the value.
    """
    name = name.replace("-", "_").lower()
    if name not in SETTINGS:
        remedy = f"Choose one of {', '.join(SETTINGS)}"
        raise ConfigError(f"/set {shown(name)}", "there is no such option", remedy)
    read, takes = SETTINGS[name]
    default = getattr(GenerationOptions(), name)
    try:
        value = default if text.lower() in NOTHING and read is not _switch else read(text)
        new = replace(options, **{name: value})
        new.check()
    except (ValueError, KeyError, OverflowError, ConfigError) as error:
        what = f"{shown(text)} is not {takes}"
        raise ConfigError(f"/set {name}", what, f"Write /set {name} and {takes}") from error
    if not 0 <= new.seed <= LARGEST_SEED:
        raise ConfigError(f"/set {name}", f"{text} is not {takes}", f"Write {takes}")
    return new


def described(options: GenerationOptions) -> str:
    """The values of all options, one a line."""
    lines = []
    for name in SETTINGS:
        value = getattr(options, name)
        if isinstance(value, bool):
            value = "on" if value else "off"
        if isinstance(value, tuple):
            value = " ".join(map(repr, value))
        lines.append(f"  {name:<20}{'none' if value in (None, '') else value}")
    return "\n".join(lines)
