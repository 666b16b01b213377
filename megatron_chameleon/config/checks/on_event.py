"""Check the receiver of a run's events: a command, or the address of a webhook."""

import re
import shlex
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_chameleon.config.schema import LoggingConfig
from megatron_chameleon.errors import ConfigError, one_line
from megatron_chameleon.masking import MASK, mask_address, mask_secrets
from megatron_chameleon.wording import shown

KEY = "logging.on_event"
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.\-]*://")


def is_url(target: str) -> bool:
    """Whether a receiver is an address, not a command."""
    return _SCHEME.match(target) is not None


def is_masked(target: str) -> bool:
    """Whether an address has lost its secret, as in the config.yaml of a run folder."""
    return is_url(target) and MASK in target


def check_on_event(config: LoggingConfig) -> Iterator[ConfigError]:
    """What is wrong with ``logging.on_event``.

    Whether the program or the server is there is not asked: a run must not depend on it.
    """
    target = config.on_event
    if target is None:
        return
    if is_url(target):
        if what := _address_problem(target.strip()):
            yield ConfigError(KEY, what, "Give an address such as https://host/path, or null")
        return
    try:
        words = shlex.split(target)
    except ValueError as error:
        what = f"{shown(mask_secrets(target))} cannot be split into words ({one_line(error)})"
        yield ConfigError(KEY, what, "Close its quotation marks")
        return
    if not words or not words[0]:
        what = f"{shown(target)} does not name a program"
        yield ConfigError(KEY, what, "Give a command or an address, or null for none")


def _address_problem(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        is_whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        return f"the address cannot be read ({one_line(error)[:100]})"
    if parts.scheme.lower() not in ("http", "https"):
        return f"{parts.scheme[:40]} is neither http nor https"
    if not is_whole or not address.isascii() or any(c.isspace() for c in address):
        return f"{shown(mask_address(address))} has no host, or has blanks or letters outside ASCII"
    return None
