"""``chameleon data audit CONFIG --step N``: read again what a step of a run saw.

``data filter`` and ``data refusals`` are in ``data_filter.py``, ``data collect`` is in
``data_collect.py``.

With ``--borders`` it shows how full the steps are at which packing blocks, stages and sources end.

The run's newest checkpoint says which mixtures it had. Without a checkpoint, or with ``--new``, the
command shows what a new run would see.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.config import load_checked
from megatron_chameleon.cli.data_collect import add_collect, run_collect
from megatron_chameleon.cli.data_filter import (
    add_filter,
    add_refusals,
    run_filter,
    run_refusals,
)
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    CONFIG,
    COUNT,
    add_action,
    add_common_options,
    add_overrides,
)
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.training.inheriting import tokenizer_in_place

if TYPE_CHECKING:
    from megatron_chameleon.data.batches.reader import BatchReader

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    audit = add_action(
        actions, "audit", "show what one step of a run saw, or how full its steps are"
    )
    audit.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(audit)
    add_start_from(audit)
    what = audit.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--step",
        type=COUNT,
        metavar="N",
        help="show the samples, sources and documents of this step, counted from 1",
    )
    what.add_argument(
        "--borders",
        action="store_true",
        help="show the padding of the steps at which a packing block, a stage or a source ends, "
        "beside that of their neighbours",
    )
    audit.add_argument(
        "--metrics",
        metavar="RUN",
        help="with --borders: the run folder or metrics.jsonl whose gradient norms are shown "
        "(default: CONFIG, if it is a run folder)",
    )
    audit.add_argument(
        "--documents",
        type=COUNT,
        default=40,
        metavar="N",
        help="how many parts of documents to list (default: 40)",
    )
    audit.add_argument(
        "--new",
        action="store_true",
        help="show what a new run would see, whatever checkpoints exist",
    )
    add_common_options(audit, nested=True)
    add_collect(add_action(actions, "collect", "write documents for loose pictures and text files"))
    summary = "keep the documents that are worth training on, and say why others are not"
    add_filter(add_action(actions, "filter", summary))
    summary = "write refusals of unsafe prompts, to train on"
    add_refusals(add_action(actions, "refusals", summary))


def run(args: argparse.Namespace) -> None:
    if args.action == "filter":
        run_filter(args)
    elif args.action == "refusals":
        run_refusals(args)
    elif args.action == "collect":
        run_collect(args)
    else:
        _audit(args)


def _audit(args: argparse.Namespace) -> None:
    if args.metrics is not None and not args.borders:
        what = "shows the gradient norms at the borders of a run, but --borders is not given"
        raise ConfigError("--metrics", what, "Add --borders in place of --step, or leave it out")
    config, weights = load_checked(args.config, args.overrides, args.start_from)

    from megatron_chameleon.data.batches.reader import BatchReader
    from megatron_chameleon.data.mixture.mixture_history import order_notes
    from megatron_chameleon.tokenizer.folder import load_tokenizer
    from megatron_chameleon.training.run.open_data import open_newest

    grad_norms = _grad_norms(args)
    with tokenizer_in_place(config, weights, 0, keep=False) as ready:
        tokenizer = load_tokenizer(ready.tokenizer.path, images=False)
    what = "all steps" if args.borders else f"step {args.step}"
    with announced(f"reading the data of {what}"):
        reader = BatchReader(config, tokenizer) if args.new else open_newest(config, tokenizer)
        text = _borders(reader, grad_norms) if args.borders else _step(reader, args)
    for line in order_notes(reader.history):
        _logger.warning(line)
    show(text)


def _step(reader: "BatchReader", args: argparse.Namespace) -> str:
    from megatron_chameleon.data.views.audit import audit_step, format_audit

    return format_audit(audit_step(reader, args.step), reader.vocabulary, args.documents)


def _borders(reader: "BatchReader", grad_norms: dict[int, float]) -> str:
    from megatron_chameleon.data.views.borders import find_borders, format_borders

    return format_borders(find_borders(reader), reader.config.training.steps, grad_norms)


def _grad_norms(args: argparse.Namespace) -> dict[int, float]:
    """The finite gradient norms of a run by step; nothing if no run is given."""
    from megatron_chameleon.runs.metrics import read_metrics

    path = Path(args.metrics if args.metrics is not None else args.config)
    if not args.borders or (args.metrics is None and not (path / "metrics.jsonl").is_file()):
        return {}
    metrics = read_metrics(path, wants=lambda key: key == "grad_norm")
    steps, values = metrics.finite("grad_norm")
    return dict(zip(steps.tolist(), values.tolist(), strict=True))
