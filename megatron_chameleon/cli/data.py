"""``chameleon data audit CONFIG --step N``: what a step of a run saw, read again.

The run's newest checkpoint says which mixtures it had; without one, or with ``--new``, it is what a
run that begins would see.
"""

import argparse

from megatron_chameleon.cli.logs import add_common_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    audit = actions.add_parser(
        "audit", help="show the samples, sources and documents of a step of a run"
    )
    audit.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    audit.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that win over the file's"
    )
    audit.add_argument("--step", type=int, required=True, metavar="N", help="counted from 1")
    audit.add_argument(
        "--documents",
        type=int,
        default=40,
        metavar="N",
        help="pieces of documents that are listed (default: 40)",
    )
    audit.add_argument("--new", action="store_true", help="as a new run: look for no checkpoint")
    add_common_options(audit, nested=True)


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.load import load_config
    from megatron_chameleon.data.batches.reader import BatchReader
    from megatron_chameleon.data.views.audit import audit_step, format_audit
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.tokenizer.folder import load_tokenizer
    from megatron_chameleon.training.run.open_data import open_newest

    if args.documents < 1:
        raise ConfigError("--documents", f"{args.documents} is less than 1", "Give a number from 1")
    config = load_config(args.config, args.overrides)
    check_config(config, smallest_world_size(config.parallel))
    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    reader = BatchReader(config, tokenizer) if args.new else open_newest(config, tokenizer)
    audit = audit_step(reader, args.step)
    print(format_audit(audit, tokenizer.vocabulary, args.documents))
