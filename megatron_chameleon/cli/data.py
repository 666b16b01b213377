"""``chameleon data audit CONFIG --step N``: read again what a step of a run saw.

The run's newest checkpoint says which mixtures it had. Without a checkpoint, or with ``--new``, the
command shows what a new run would see.
"""

import argparse

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.config import load_checked
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    CONFIG,
    COUNT,
    add_action,
    add_common_options,
    add_overrides,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    audit = add_action(
        actions, "audit", "show the samples, sources and documents of one step of a run"
    )
    audit.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(audit)
    audit.add_argument(
        "--step", type=COUNT, required=True, metavar="N", help="the step, counted from 1"
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


def run(args: argparse.Namespace) -> None:
    config = load_checked(args.config, args.overrides)

    from megatron_chameleon.data.batches.reader import BatchReader
    from megatron_chameleon.data.views.audit import audit_step, format_audit
    from megatron_chameleon.tokenizer.folder import load_tokenizer
    from megatron_chameleon.training.run.open_data import open_newest

    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    with announced(f"reading the data of step {args.step}"):
        reader = BatchReader(config, tokenizer) if args.new else open_newest(config, tokenizer)
        audit = audit_step(reader, args.step)
    show(format_audit(audit, tokenizer.vocabulary, args.documents))
