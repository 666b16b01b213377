"""Options and arguments that several verbs share, and the checks of their values."""

import argparse
import logging
from typing import Any


def add_common_options(parser: argparse.ArgumentParser, nested: bool = False) -> None:
    """Add the options that every verb has: ``--debug``, ``--verbose`` and ``--quiet``.

    Args:
        parser: The parser of a verb, or of one of its actions.
        nested: Whether this is an action's parser. Its defaults then do not overwrite what was
            given before the action, as in ``chameleon tokenizer --debug text``.
    """
    absent = argparse.SUPPRESS if nested else None
    parser.add_argument(
        "--debug",
        action="store_true",
        default=absent or False,
        help="show the full traceback of an error",
    )
    amount = parser.add_mutually_exclusive_group()
    for name, level, summary in (
        ("--verbose", logging.DEBUG, "print more details"),
        ("--quiet", logging.WARNING, "print only results, warnings and errors"),
    ):
        amount.add_argument(
            name,
            dest="log_level",
            action="store_const",
            const=level,
            default=absent or logging.INFO,
            help=summary,
        )


def add_action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Add the parser of a verb or of one of its actions, with its summary as the description.

    Args:
        actions: What ``add_subparsers`` returned.
        name: The word on the command line.
        summary: What it does, beginning in lower case and without a full stop.
    """
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=description
    )
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are sampled; defaults are ``GenerationOptions``'s."""
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling (default: 1)")
    parser.add_argument(
        "--temperature", type=float, help="0 always takes the likeliest token (default: 0.7)"
    )
    parser.add_argument(
        "--top-p", type=float, help="sample from this share of the probability (default: 0.9)"
    )
    parser.add_argument(
        "--guidance", type=float, help="guidance scale of images; 1 is off (default: 1)"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="most tokens per answer (default: until the context is full)"
    )
    parser.add_argument(
        "--force", choices=("image", "text"), help="answer with one image, or with text only"
    )


def add_overrides(parser: argparse.ArgumentParser, condition: str = "") -> None:
    """Add the words ``section.key=value``, which replace values of a config file.

    Args:
        parser: The parser of a verb or of one of its actions.
        condition: When they apply, such as "with a config"; empty if always.
    """
    summary = "values that replace those of the config file"
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"{condition}: {summary}" if condition else summary,
    )


def check_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Refuse a number below 1.

    Args:
        args: What was parsed.
        names: Options, such as ``batch_size``. One that was not given or does not exist is fine.

    Raises:
        ConfigError: A number is below 1.
    """
    from megatron_chameleon.errors import ConfigError

    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(option, f"{value} is below 1", "Use 1 or more")
