"""Read YAML that somebody else may have written: within limits, and with one line per mistake."""

import codecs
import io
import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_chameleon.errors import ConfigError, first_line
from megatron_chameleon.files import read_bytes
from megatron_chameleon.wording import shown

LARGEST_BYTES = 1 << 20
LARGEST_DEPTH = 32
MOST_NODES = 20_000
"""Keys and values of a file, counting what aliases repeat. A thousand data sources have 7,000."""

ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError)
"""What the two libraries raise for text that a user wrote. ValueError: a number of 5,000 digits."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_PLAIN_TAGS |= {"tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", "!"}
# YAML 1.1 reads 010 as 8 and 1:30 as 90.
_MISREAD = re.compile(r"[-+]?(0[0-7_]*[0-7]|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def read_yaml(path: Path) -> DictConfig:
    """A YAML file whose top level is a mapping. It may be UTF-8 or UTF-16, with or without a BOM.

    Raises:
        ConfigError: The file does not exist, is not valid YAML, is not a mapping, holds other than
            plain values, or is larger or nested deeper than a config can be.
    """
    if not path.is_file():
        raise ConfigError(str(path), "no such config file", "Give the path of a YAML file")
    text = _decode(read_bytes(path, ConfigError, LARGEST_BYTES), path)
    check_yaml(text, str(path))
    try:
        loaded = OmegaConf.load(io.StringIO(text), max_yaml_expanded_nodes=MOST_NODES)
    except OSError:  # OmegaConf's error for a number
        loaded = None
    except ERRORS as error:
        raise yaml_error(str(path), error) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(str(path), "the top level is not a mapping", "Write sections with keys")
    return loaded


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that is not plain values within the limits. No value is built.

    Args:
        text: A document.
        where: For errors; the line is added.

    Raises:
        ConfigError: It names the line.
    """
    depth = nodes = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            mark = event.start_mark
            place = f"{where}:{mark.line + 1}" if mark and "\n" in text else where
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            nodes += isinstance(event, yaml.NodeEvent)
            if depth > LARGEST_DEPTH or nodes > MOST_NODES:
                what = f"more than {LARGEST_DEPTH} levels or {MOST_NODES:,} keys and values"
                raise ConfigError(place, what, "Check that it is a config")
            if (tag := getattr(event, "tag", None)) and tag not in _PLAIN_TAGS:
                what = f"the tag {shown(tag)} is not allowed"
                raise ConfigError(place, what, "Write a plain value")
            if number := _misread(event):
                what = f"YAML would read {shown(number)} as another number"
                raise ConfigError(place, what, "Write a decimal number, or quote it")
    except (yaml.YAMLError, RecursionError, UnicodeEncodeError) as error:
        raise yaml_error(where, error) from error


def yaml_error(where: str, error: Exception) -> ConfigError:
    """The error to raise for one of ``ERRORS``, with the line if the library knows it."""
    mark = getattr(error, "problem_mark", None)
    place = f"{where}:{mark.line + 1}" if mark else where
    problem = getattr(error, "problem", None) or first_line(error)
    if "expan" in problem:  # OmegaConf's text is long, and about its own settings
        problem = f"aliases repeat its values to more than {MOST_NODES:,}"
    return ConfigError(place, f"not valid YAML ({problem[:200]})", "Correct that line")


def _decode(content: bytes, path: Path) -> str:
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = f"byte {error.start} is not UTF-8"
        raise ConfigError(f"{path}:{line}", what, "Save the file as UTF-8") from error


def _misread(event: yaml.Event) -> str | None:
    """A number without quotes or a tag that YAML 1.1 takes for another one."""
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.tag is None:
        return event.value if _MISREAD.fullmatch(event.value) else None
    return None
