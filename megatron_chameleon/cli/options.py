"""Options and arguments that several verbs share, and the limits of their values.

An option that takes a number has one of the types below, so ``--gpus nan`` ends with a line that
says what the option takes. ``tests/unit/cli/test_option_values.py`` finds options without one.
"""

import argparse
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_chameleon.cli.examples import examples_text
from megatron_chameleon.cli.single_values import StoreOnce
from megatron_chameleon.config.constraints import Above, Between, Constraint, Within
from megatron_chameleon.tokenizer.common.grids import MOST_BUDGET, MOST_RATIO
from megatron_chameleon.wording import shown

if TYPE_CHECKING:
    from megatron_chameleon.images.options import ImageOptions
    from megatron_chameleon.inference.engine.options import GenerationOptions

_LONGEST_NUMBER = 100
"""Characters; Python takes a long time to read a number of millions of digits."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all other mistakes.

    Its help ends with two examples. An option that takes one value refuses two that differ.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for action in (None, "store"):
            self.register("action", action, StoreOnce)

    def format_help(self) -> str:
        return super().format_help() + examples_text(self.prog)

    def error(self, message: str) -> NoReturn:
        text = message.splitlines()[0].removeprefix("argument ")
        if len(text) > 400 or not text.isprintable():
            text = shown(text[:300])
        end = "" if text.endswith((".", "?", "!")) else "."
        self.exit(2, f"error: {text}{end} See `{self.prog} --help`.\n")


@dataclass(frozen=True)
class NumberOption:
    """The ``type`` of an option that takes a number."""

    kind: type[int] | type[float]
    constraint: Constraint

    def __call__(self, text: str) -> int | float:
        value = _read_number(text, self.kind)
        if value is None or not self.constraint.allows(value):
            noun = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {noun} {self.constraint}")
        return value


def _read_number(text: str, kind: type[int] | type[float]) -> int | float | None:
    """The number, or None. A whole number may be written as 1e3."""
    if len(text) > _LONGEST_NUMBER:
        return None
    try:
        if kind is int and re.fullmatch(r"\s*[-+]?[0-9_]+\s*", text):
            return int(text)
        value = float(text)
    except ValueError:
        return None
    if kind is float:
        return value
    return int(value) if value.is_integer() else None


CONFIG = "a YAML file, a run folder, or the name of a preset"
"""What ``config/names.py`` finds a config by."""

COUNT = NumberOption(int, Between(1, 10**9))
INDEX = NumberOption(int, Between(0, 10**15))
SEED = NumberOption(int, Between(0, 2**63 - 1))
BATCH = NumberOption(int, Between(1, 2**16))
WORKERS = NumberOption(int, Between(1, 1024))
IDS = NumberOption(int, Between(1, 2**20))
IMAGE_BUDGET = NumberOption(int, Between(1, MOST_BUDGET))
RATIO = NumberOption(float, Between(1, MOST_RATIO))
TOKENS = NumberOption(int, Between(1, 2**24))
HELD_OUT_TOKENS = NumberOption(int, Between(1, 10**15))
ANSWERS = NumberOption(int, Between(1, 10**5))
ASKED_PROMPTS = NumberOption(int, Between(1, 1000))
FORMS = NumberOption(int, Between(1, 1000))
RESAMPLES = NumberOption(int, Between(1, 10**5))
FILES = NumberOption(int, Between(1, 1024))
GPU_COUNT = NumberOption(int, Between(1, 10**6))
PIXELS = NumberOption(int, Between(1, 178_956_970))
"""Pillow itself refuses larger images."""
MIB = NumberOption(int, Between(1, 2**20))
GIB = NumberOption(float, Above(0, at_most=2**20))
PART = NumberOption(float, Within(0, 1))
SHARE = NumberOption(float, Between(0, 1))
PROBABILITY = NumberOption(float, Above(0, at_most=1))
TEMPERATURE = NumberOption(float, Between(0, 100))
GUIDANCE = NumberOption(float, Between(0, 1000))
WATCH_SECONDS = NumberOption(float, Between(0.1, 86400))
SECONDS = NumberOption(float, Between(0, 10**7))
TIMEOUT = NumberOption(float, Between(0.1, 86400))
TOLERANCE = NumberOption(float, Between(0, 1000))


def device(text: str) -> str:
    """The ``type`` of ``--device``: cpu, cuda, or cuda:1 and so on."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not cpu, cuda or cuda:N")
    return text


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


def add_ema_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--ema`` to a verb that runs a model."""
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the moving average of a training checkpoint's weights (training.ema_decay)",
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument CHECKPOINT, which ``open_checkpoint`` opens."""
    parser.add_argument("checkpoint", help="a checkpoint, a run folder or an exported folder")


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tokenizer`` to a verb that takes a checkpoint."""
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer folder (default: the checkpoint's)"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` to a verb that prints a table otherwise."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are sampled; defaults are ``GenerationOptions``'s."""
    parser.add_argument("--seed", type=SEED, default=1, help="seed of the sampling (default: 1)")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, help="0 always takes the likeliest token (default: 0.7)"
    )
    parser.add_argument(
        "--top-p",
        type=PROBABILITY,
        help="sample from this share of the probability (default: 0.9)",
    )
    parser.add_argument(
        "--guidance", type=GUIDANCE, help="guidance scale of images; 1 is off (default: 1)"
    )
    parser.add_argument(
        "--max-tokens",
        type=TOKENS,
        help="most tokens per answer (default: until the context is full)",
    )
    parser.add_argument(
        "--force", choices=("image", "text"), help="answer with one image, or with text only"
    )
    parser.add_argument(
        "--size",
        metavar="WIDTH:HEIGHT",
        help="shape of the images, such as 3:2 or 480x320: each gets the grid of codes that is "
        "nearest to it (default: the model chooses). It needs a tokenizer made with --image-grids",
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer where this text appears in it; can be repeated",
    )


def generation_options(args: argparse.Namespace) -> "GenerationOptions":
    """What ``add_sampling_options`` parsed, and ``--guidance-image`` and ``--batch-size``.

    Raises:
        ConfigError: A value cannot work.
    """
    from megatron_chameleon.inference.engine.modality import Force
    from megatron_chameleon.inference.engine.options import GenerationOptions

    names = (
        *("temperature", "top_p", "guidance", "guidance_image", "max_tokens", "size"),
        "batch_size",
    )
    values = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    force = Force(args.force) if args.force else None
    options = GenerationOptions(seed=args.seed, force=force, stop=tuple(args.stop), **given)
    options.check()
    return options


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which images may be opened; ``image_options`` reads them."""
    parser.add_argument(
        "--image-root",
        metavar="DIR",
        action="append",
        default=[],
        help="folder or URL below which images may lie, besides the folder of their documents; can "
        "be repeated",
    )
    parser.add_argument(
        "--image-protocols",
        metavar="NAME,...",
        default="",
        help="protocols by which documents may name images, such as http,https,s3 (default: none)",
    )
    parser.add_argument(
        "--image-profiles",
        choices=("apply", "ignore"),
        default="apply",
        help="apply an image's colour profile, so that its colours are those of sRGB (the "
        "default), or ignore it",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=PIXELS,
        default=1 << 26,
        metavar="N",
        help="images with more pixels are dropped (default: 67108864)",
    )
    parser.add_argument(
        "--max-image-mib",
        type=MIB,
        default=128,
        metavar="N",
        help="image files with more MiB are dropped (default: 128)",
    )


def image_options(args: argparse.Namespace) -> "ImageOptions":
    """What ``add_image_options`` parsed.

    Raises:
        ConfigError: A value cannot work.
    """
    from megatron_chameleon.images.options import ImageOptions

    names = (name.strip().lower() for name in args.image_protocols.split(","))
    options = ImageOptions(
        roots=tuple(args.image_root),
        protocols=tuple(name for name in names if name),
        profiles=args.image_profiles,
        max_pixels=args.max_image_pixels,
        max_mib=args.max_image_mib,
    )
    options.check()
    return options


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
