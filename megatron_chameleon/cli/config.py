"""``chameleon config check CONFIG``: every value of a config beside the paper's.

    chameleon config check chameleon_34b
    chameleon config check my.yaml optimizer.lr=3e-4 --paper 7b
    chameleon config check examples/sft/train.yaml --stage sft

Deviations from the paper are fine: the exit code is 0. Errors are listed, and the exit code is 2. A
tokenizer or data that are still to be set count as missing, which is not an error.
"""

import argparse
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import CONFIG, add_action, add_common_options, add_overrides
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.training.inheriting import load_inheriting, tokenizer_in_place

if TYPE_CHECKING:
    from megatron_chameleon.checkpoint.formats.base import CheckpointReader
    from megatron_chameleon.config.paper import PaperComparison
    from megatron_chameleon.config.schema import Config

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    check = add_action(kinds, "check", "show every value beside the paper's and mark deviations")
    check.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(check)
    add_start_from(check)
    check.add_argument(
        "--paper",
        choices=("7b", "34b"),
        help="size to compare with (default: the preset's, or the nearest)",
    )
    check.add_argument(
        "--stage",
        choices=("pretraining", "sft"),
        default="pretraining",
        help="compare with pretraining (stages 1 and 2, the default) or with fine-tuning",
    )
    add_common_options(check, nested=True)


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.config import paper
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.load import find_preset
    from megatron_chameleon.config.names import find_config
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.schedules.batch_sizes import plan_batches, samples_before

    path = find_config(args.config)
    config, weights = load_inheriting(path, args.overrides, args.start_from)
    check_config(filled_in(config), smallest_world_size(config.parallel))
    try:
        config = with_known_steps(config, weights)
    except ConfigError as error:  # data that are still to be made are not an error here
        _logger.warning(error.lines()[0])
    size = args.paper or _size_of_preset(find_preset(path, args.overrides))
    chosen = size or paper.nearest_size(config)
    vocab_size, note = find_vocab_size(config, weights)

    rows = paper.compare(config, chosen, args.stage)
    samples = samples_before(plan_batches(config.training), config.training.steps)
    derived = paper.derived_rows(config, chosen, args.stage, vocab_size, samples)
    why = "" if size else " (the nearest in depth and width; choose with --paper)"
    deviations = sum(row.mark == paper.DEVIATES for row in [*rows, *derived])
    text = [
        f"{args.config} beside the paper's {chosen.upper()}, {args.stage}{why}: arXiv 2405.09818",
        f"{paper.LEGEND}\n",
        f"{_table(rows, derived)}\n",
        f"{_parameters(config, vocab_size)}{note}",
        f"{deviations} of {len(rows) + len(derived)} values deviate from the paper's",
    ]
    missing = [row.key for row in rows if row.value == paper.TO_BE_SET]
    if missing:
        text.append(f"{paper.TO_BE_SET} before training: {', '.join(missing)}")
    show("\n".join(text))
    for line in paper.warnings(config):
        _logger.warning(line)


def load_checked(
    name: str, overrides: Sequence[str], start_from: str | None = None
) -> "tuple[Config, CheckpointReader | None]":
    """Load the config of a run and check it, before the imports that take seconds.

    Args:
        name: As ``config/names.py`` finds it.
        overrides: As ``load_config`` takes them.
        start_from: The weights that the run begins with, from which the config inherits.

    Returns:
        As ``load_inheriting`` does.

    Raises:
        ChameleonError: There is no such config, it cannot work on any number of processes, or the
            weights cannot be opened or contradict it.
    """
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.names import find_config

    config, weights = load_inheriting(find_config(name), overrides, start_from)
    check_config(config, smallest_world_size(config.parallel))
    return config, weights


def with_known_steps(config: "Config", weights: "CheckpointReader | None" = None) -> "Config":
    """The config with the number of steps that ``training.epochs`` leads to, if it says it.

    Args:
        config: Of the run.
        weights: Those that it begins with, whose tokenizer the run folder may not have yet.

    Raises:
        ChameleonError: The data, of which they follow, cannot be read.
    """
    if config.training.epochs is None:
        return config
    from megatron_chameleon.data.batches.reader import BatchReader
    from megatron_chameleon.errors import ChameleonError, ConfigError
    from megatron_chameleon.tokenizer.folder import load_tokenizer

    if not config.tokenizer.path:
        what = "the number of steps follows from the token files, which need a tokenizer, and "
        what += "tokenizer.path is not set"
        remedy = "Give --start-from with the weights whose tokenizer the run inherits, or set "
        raise ConfigError("training.epochs", what, remedy + "training.steps in its place")
    try:
        with tokenizer_in_place(config, weights, 0, keep=False) as there:
            tokenizer = load_tokenizer(there.tokenizer.path, images=False)
            return BatchReader(config, tokenizer).config
    except ChameleonError as error:
        what = "the number of steps follows from the token files, which cannot be read: "
        what += str(error).splitlines()[0].rstrip(".")
        remedy = "Make them first, or set training.steps in its place"
        raise ConfigError("training.epochs", what, remedy) from error


def filled_in(config: "Config") -> "Config":
    """A copy in which what is still to be set has a placeholder, so that it is not an error."""
    from dataclasses import replace

    from megatron_chameleon.config.schema import SourceConfig, TokenizerConfig

    tokenizer = config.tokenizer if config.tokenizer.path else TokenizerConfig("later")
    stage1 = config.data.stage1 or [SourceConfig("later")]
    return replace(config, tokenizer=tokenizer, data=replace(config.data, stage1=stage1))


def _size_of_preset(preset: str | None) -> str | None:
    """``chameleon_7b`` -> ``7b``; None if the preset is not one of the paper's sizes."""
    from megatron_chameleon.config.paper import SIZES

    return next((size for size in SIZES if preset and preset.endswith(f"_{size}")), None)


def find_vocab_size(config: "Config", weights: "CheckpointReader | None" = None) -> tuple[int, str]:
    """The vocabulary size of the weights or the config's tokenizer; the paper's without either.

    Returns:
        The size, and a note for the user, which is empty for the config's own.
    """
    from pathlib import Path

    from megatron_chameleon.config.paper import VOCAB_SIZE
    from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

    if weights is not None:
        return weights.dimensions.vocab_size, ""
    path = config.tokenizer.path
    if path and Path(path).is_dir():
        return Vocabulary.load(Path(path)).size, ""
    return VOCAB_SIZE, "; the vocabulary is the paper's, because there is no tokenizer yet"


def _table(rows: "Sequence[PaperComparison]", derived: "Sequence[PaperComparison]") -> str:
    """Aligned columns, as wide as they need to be on any terminal, so that nothing is cut."""
    cells: list[tuple[str, tuple[str, ...]]] = []
    for row in [*rows, *derived]:
        section, _, key = row.key.partition(".")
        line = (row.mark, key, _text(row.value), _text(row.paper, "-"), row.source)
        cells.append((section, line))
    widths = [max(len(line[column]) for _, line in cells) for column in range(4)]
    text = []
    for section, group in itertools.groupby(cells, key=lambda cell: cell[0]):
        lines = [("", section, "here", "paper", "source"), *(line for _, line in group)]
        text.append("\n".join(_line(line, widths) for line in lines))
    return "\n\n".join(text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells[:4], widths, strict=True)]
    return "  ".join([*padded, cells[4]]).rstrip()


def _text(value: object, none: str = "null") -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        for unit, name in ((1e12, "T"), (1e9, "B")):
            if value >= unit:
                return f"{value / unit:g}{name}"
        return f"{value:g}"
    return str(value)


def _parameters(config: "Config", vocab_size: int) -> str:
    from megatron_chameleon.config.parameters import parameter_counts

    counts = parameter_counts(config.model, vocab_size)
    return (
        f"{counts.total:,} parameters: input embeddings {counts.embeddings:,} + output layer "
        f"{counts.embeddings:,} (vocabulary {vocab_size:,}) + {counts.num_layers} layers x "
        f"{counts.layer:,} (attention {counts.attention:,}, feed-forward {counts.feed_forward:,}, "
        f"norms {counts.norms:,}, QK-norms {counts.qk_norms:,}) + final norm {counts.final_norm:,}"
    )
