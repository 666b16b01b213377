"""What the shell may complete a command line with: answers the scripts of ``completion.py``.

argcomplete reads verbs, actions, options and choices from the parsers. This file adds what an
argument takes, in a table by its name (argparse's ``dest``) or its ``metavar``. An argument that is
not in the table and takes no number gets the names of files.
"""

import argparse
import os
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from argcomplete.completers import BaseCompleter
from argcomplete.finders import CompletionFinder, safe_actions
from argcomplete.lexers import split_line

from megatron_chameleon.cli.options import NumberOption
from megatron_chameleon.cli.single_values import StoreOnce
from megatron_chameleon.config.keys import Key, config_keys
from megatron_chameleon.config.names import PRESETS, SUFFIXES, preset_names
from megatron_chameleon.config.schema import Config

Found = Iterator[str]


def complete(
    build_parser: Callable[[str | None], argparse.ArgumentParser],
    verbs: Container[str],
    end_process: Callable[[int], Any] = os._exit,
) -> None:
    """Answer the shell, and end the process.

    Args:
        build_parser: Takes the verb of the line, or None.
        verbs: All of them.
        end_process: Takes the exit code.
    """
    line, point = os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT", "")
    before = split_line(line, int(point))[3] if point.isdigit() else []
    # argcomplete carries out the actions that it knows to change nothing but the parsed values
    safe_actions.add(StoreOnce)
    words = [word for word in before[1:2] if word in verbs]
    parser = build_parser(words[0] if words else None)
    Finder()(
        parser,
        always_complete_options=False,
        default_completer=Values(),
        exit_method=end_process,
    )


class Finder(CompletionFinder):
    """argcomplete's, which also finds ``section.key=value`` behind an option, as ``main`` does."""

    def collect_completions(
        self,
        active_parsers: list[argparse.ArgumentParser],
        parsed_args: argparse.Namespace,
        cword_prefix: str,
    ) -> list[str]:
        found: list[str] = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        parser = active_parsers[-1]
        active: list[argparse.Action] = parser.active_actions  # type: ignore[attr-defined]
        waiting = any(action.option_strings for action in active)
        words = next((a for a in parser._actions if a.dest == "overrides"), None)
        if words is not None and not waiting and not cword_prefix.startswith("-"):
            is_given = getattr(parsed_args, "config", None) is not None
            if is_given and words not in active:
                found += argument_values(cword_prefix, words)
        return found


class Values(BaseCompleter):
    """argcomplete's way to ask ``argument_values``."""

    def __call__(self, *, prefix: str, action: argparse.Action, **_: object) -> list[str]:
        return argument_values(prefix, action)


def argument_values(prefix: str, action: argparse.Action) -> list[str]:
    """The values of an argument without choices that begin with ``prefix``."""
    if isinstance(action.type, NumberOption):
        return []
    names = (name for name in (action.dest, str(action.metavar)) if name in _VALUES)
    values = _VALUES[next(names, _ANYTHING)]
    return sorted(value for value in values(prefix) if value.startswith(prefix))


def _files(prefix: str, suffixes: tuple[str, ...] = ()) -> Found:
    """The files and folders that a path can go on with; a folder ends with a slash."""
    head = prefix[: prefix.rfind("/") + 1]
    start = prefix[len(head) :]
    try:
        entries = [(entry.name, entry.is_dir()) for entry in Path(head).expanduser().iterdir()]
    except (OSError, ValueError, RuntimeError):  # not readable, a null byte, or an unknown ~user
        return
    for name, is_folder in entries:
        if name.startswith(start) and (start or not name.startswith(".")):
            if is_folder:
                yield f"{head}{name}/"
            elif not suffixes or name.endswith(suffixes):
                yield head + name


def _folders(prefix: str) -> Found:
    return (path for path in _files(prefix) if path.endswith("/"))


def _token_files(prefix: str) -> Found:
    """Token files without their suffixes, and folders."""
    for path in _files(prefix, (".idx",)):
        yield path.removesuffix(".idx")


def _configs(prefix: str) -> Found:
    yield from preset_names(PRESETS)
    yield from _files(prefix, SUFFIXES)


def _image_configs(prefix: str) -> Found:
    from megatron_chameleon.tokenizer.image.config import PRESETS

    yield from preset_names(PRESETS)
    yield from _files(prefix, SUFFIXES)


def _inspected(prefix: str) -> Found:
    yield from preset_names(PRESETS)
    paths = list(_files(prefix))
    token_files = [path.removesuffix(".idx") for path in paths if path.endswith(".idx")]
    belonging = tuple(f"{path}." for path in token_files)
    yield from token_files
    yield from (path for path in paths if not path.startswith(belonging))


def _images(prefix: str) -> Found:
    """Files, and keys of the image tokenizer's config, which may stand among them."""
    from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig

    yield from _files(prefix)
    if prefix:
        yield from _settings(prefix, ImageTokenizerConfig)


def _overrides(prefix: str) -> Found:
    return _settings(prefix, Config)


def _settings(prefix: str, cls: type) -> Found:
    """The keys of a config, each with ``=``, or the values of the key that is there already."""
    keys = config_keys(cls)
    key, equals, start = prefix.partition("=")
    if not equals:
        yield from (f"{name}=" for name in keys)
        return
    known = keys.get(key, Key())
    yield from (f"{key}={value}" for value in known.values)
    if known.is_path:
        yield from (f"{key}={path}" for path in _files(start))


def _filters(prefix: str) -> Found:
    yield "paper"
    yield from _files(prefix, SUFFIXES)


def _resume(prefix: str) -> Found:
    yield from ("auto", "never")
    yield from _folders(prefix)


def _formats(prefix: str) -> Found:
    from megatron_chameleon.checkpoint.formats import FORMATS

    yield from FORMATS


def _tasks(prefix: str) -> Found:
    from megatron_chameleon.evaluation.tasks.catalogue import TASKS

    yield from _listed(prefix, ["list", *(task.name for task in TASKS)])
    yield from _files(prefix, SUFFIXES)


def _metrics(prefix: str) -> Found:
    from megatron_chameleon.training.run.folder import METRICS

    return _listed(prefix, METRICS)


def _protocols(prefix: str) -> Found:
    return _listed(prefix, ("http", "https", "s3", "gs", "hf"))


def _devices(prefix: str) -> Found:
    yield from ("cpu", "cuda")


def _nothing(prefix: str) -> Found:
    yield from ()


def _listed(prefix: str, names: Sequence[str]) -> Found:
    """Names behind those of a list with commas that is there already."""
    head = prefix[: prefix.rfind(",") + 1]
    return (head + name for name in names if name not in head.split(","))


_ANYTHING = ""
_VALUES: dict[str, Callable[[str], Found]] = {
    _ANYTHING: _files,
    "CONFIG": _configs,
    "overrides": _overrides,
    "images": _images,
    "NAME|YAML": _image_configs,
    "PREFIX|CONFIG|INPUT": _inspected,
    "YAML": _filters,
    "PREFIX": _token_files,
    "DIR": _folders,
    "RUN": _files,  # plot also takes a metrics.jsonl
    "FORMAT": _formats,
    "auto|never|PATH": _resume,
    "device": _devices,
    "keys": _metrics,
    "tasks": _tasks,
    "image_protocols": _protocols,
    **dict.fromkeys(
        (
            *("TEXT", "KEY", "KEY,...", "NAME", "NAME=VALUE", "SITE", "MODULE:FUNCTION", "CODE"),
            *("I/N", "WxH", "host", "name"),
        ),
        _nothing,
    ),
}
"""From the name or the metavar of an argument to what it takes."""
