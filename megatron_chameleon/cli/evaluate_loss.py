"""``chameleon evaluate-loss CHECKPOINT --data PREFIX...``: loss and perplexity on token files.

chameleon evaluate-loss runs/digits --data held_out/captions held_out/drawings
chameleon evaluate-loss exported --data held_out/captions --json
torchrun --nproc-per-node 2 -m megatron_chameleon evaluate-loss runs/7b \
    --data held_out/captions parallel.tensor_model_parallel_size=2
"""

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import (
    HELD_OUT_TOKENS,
    add_checkpoint_argument,
    add_ema_option,
    add_json_option,
    add_overrides,
    add_tokenizer_option,
)
from megatron_chameleon.cli.ranks import one_of_a_job

if TYPE_CHECKING:
    from megatron_chameleon.checkpoint.formats.base import CheckpointReader
    from megatron_chameleon.parallel.launch import Launch
    from megatron_chameleon.training.validation.losses import HeldOutLosses, PreferenceLosses

REPORT_SECONDS = 10.0
_SETTING = re.compile(r"[a-z0-9_]+\.[\w.\[\]]+=.*", re.DOTALL)
"""A word for ``overrides`` that argparse takes for one of ``--data``'s."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    add_overrides(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="PREFIX",
        default=[],
        help="token files to measure (default: those of data.validation in the run's config)",
    )
    parser.add_argument(
        "--max-tokens",
        type=HELD_OUT_TOKENS,
        metavar="N",
        help="measure about N tokens of each, in documents evenly spread over the file (default: "
        "all)",
    )
    add_tokenizer_option(parser)
    add_ema_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    with one_of_a_job(debug=args.debug) as launch:
        _measure(args, launch)


def _measure(args: argparse.Namespace, launch: "Launch") -> None:
    from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
    from megatron_chameleon.data.validation.reader import HeldOutReader
    from megatron_chameleon.data.validation.same_documents import trained_sources
    from megatron_chameleon.training.validation.checkpoint import (
        evaluation_config,
        measure_checkpoint,
    )
    from megatron_chameleon.training.validation.losses import PreferenceLosses

    overrides = [*args.overrides, *filter(_SETTING.fullmatch, args.data)]
    prefixes = [word for word in args.data if not _SETTING.fullmatch(word)]
    reader = open_checkpoint(args.checkpoint, ema=args.ema)
    config = evaluation_config(reader, prefixes, overrides, launch.world_size)
    if args.max_tokens:
        config.data.validation.max_tokens = args.max_tokens
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(reader, args.tokenizer, Path(scratch))
        held_out = HeldOutReader(
            config, tokenizer, "--data" if prefixes else "data.validation.sources"
        )
    if launch.rank == 0:
        for line in held_out.warnings(trained_sources(reader.config, tokenizer)):
            logging.getLogger(__name__).warning(line)
    report = _Reporter(is_silent=launch.rank > 0)
    losses = measure_checkpoint(reader, config, held_out, launch, report)
    if launch.rank == 0:
        if args.json:
            show(json.dumps(_values(reader, losses), indent=1))
        elif isinstance(losses, PreferenceLosses):
            show(_pair_table(losses))
        else:
            show(_table(losses))


class _Reporter:
    """Says how far it is, not more often than every ten seconds."""

    def __init__(self, is_silent: bool) -> None:
        self._is_silent, self._last = is_silent, time.monotonic()

    def __call__(self, sequences: int) -> None:
        now = time.monotonic()
        if not self._is_silent and now - self._last >= REPORT_SECONDS:
            self._last = now
            progress(f"{sequences:,} sequences measured")


def _values(
    reader: "CheckpointReader", losses: "HeldOutLosses | PreferenceLosses"
) -> dict[str, object]:
    from megatron_chameleon.training.validation.losses import PreferenceLosses

    def entry(name: str | None) -> dict[str, object]:
        if isinstance(losses, PreferenceLosses):
            pairs = sum(losses.pairs.values()) if name is None else losses.pairs[name]
            return {**(losses.total if name is None else losses.means(name)), "pairs": pairs}
        found = losses.total if name is None else losses.sources[name]
        values = {key: v if v is not None and isfinite(v) else None for key, v in found.values()}
        tokens = {"tokens": found.tokens, "tokens_text": found.text_tokens}
        return {**values, **tokens, "tokens_image": found.image_tokens}

    sources = {name: entry(name) for name in losses.sources}
    return {
        "checkpoint": str(reader.folder),
        "step": reader.step,
        **entry(None),
        "sources": sources,
    }


def _table(losses: "HeldOutLosses") -> str:
    """One row for each source and modality, and rows for all sources together."""
    rows = [("source", "tokens", "number", "loss", "perplexity")]
    listed = [*losses.sources.items()]
    if len(listed) > 1:
        listed.append(("all", losses.total))
    for name, found in listed:
        values = dict(found.values())
        counts = {"": found.tokens, "_text": found.text_tokens, "_image": found.image_tokens}
        for kind, count in counts.items():
            loss, perplexity = values[f"loss{kind}"], values[f"perplexity{kind}"]
            if count and (not kind or 0 < found.text_tokens < found.tokens):
                label = kind.removeprefix("_") or "all"
                rows.append((name, label, f"{count:,}", f"{loss:.4f}", f"{perplexity:,.4g}"))
            elif not kind:
                rows.append((name, "all", "0", "-", "-"))
    return _aligned(rows, left=2)


def _pair_table(losses: "PreferenceLosses") -> str:
    """One row for each source, and one for all sources together."""
    keys = ("loss", "reward_margin", "reward_accuracy", "chosen_logp", "rejected_logp")
    rows = [("source", "pairs", *(key.replace("_", " ") for key in keys))]
    listed = [(name, losses.pairs[name], losses.means(name)) for name in losses.sources]
    if len(listed) > 1:
        listed.append(("all", sum(losses.pairs.values()), losses.total))
    for name, count, means in listed:
        values = ["-" if (v := means[key]) is None else f"{v:.4f}" for key in keys]
        rows.append((name, f"{count:,}", *values))
    return _aligned(rows, left=1)


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> str:
    """The rows with columns of one width; the first ``left`` columns are aligned left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
