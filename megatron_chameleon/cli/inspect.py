"""``chameleon inspect PREFIX --html FILE``: what is in a token file, as the model will see it.

With a config in place of a prefix: the run's mixture, and on the page the packed sequences of a
step.
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefix",
        metavar="PREFIX|CONFIG",
        help="token file, without .bin and .idx; or the YAML file of a run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="with a config: values that win over the file's",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="also write documents or sequences as an HTML page"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer folder, if it is not where it was when the token file was written",
    )
    parser.add_argument(
        "--documents", type=int, default=20, metavar="N", help="documents on the page (default: 20)"
    )
    parser.add_argument(
        "--start", type=int, default=0, metavar="K", help="the first of them (default: 0)"
    )
    parser.add_argument(
        "--step",
        type=int,
        default=1,
        metavar="N",
        help="with a config: the step whose sequences are on the page, counted from 1 (default: 1)",
    )
    parser.add_argument(
        "--sequences", type=int, default=8, metavar="N", help="sequences on the page (default: 8)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="look at every length, offset and image of the index"
    )


def run(args: argparse.Namespace) -> None:
    if Path(args.prefix).suffix in (".yaml", ".yml"):
        _inspect_mixture(args)
    else:
        _inspect_token_file(args)


def _inspect_mixture(args: argparse.Namespace) -> None:
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.load import load_config
    from megatron_chameleon.data.preprocess.encode import load_for_encoding
    from megatron_chameleon.data.views.audit import audit_step
    from megatron_chameleon.data.views.sequence_page import mixture_summary, write_sequence_page
    from megatron_chameleon.errors import ConfigError, DataError
    from megatron_chameleon.training.run.open_data import open_newest

    if args.sequences < 1:
        raise ConfigError("--sequences", f"{args.sequences} is less than 1", "Give a number from 1")
    config = load_config(args.prefix, args.overrides)
    check_config(config, smallest_world_size(config.parallel))
    tokenizer = load_for_encoding(args.tokenizer or config.tokenizer.path)
    reader = open_newest(config, tokenizer)
    print(mixture_summary(reader))
    for line in reader.warnings():
        print(f"warning: {line}", file=sys.stderr)
    if args.html:
        audit = audit_step(reader, args.step)
        try:
            written = write_sequence_page(Path(args.html), audit, reader, tokenizer, args.sequences)
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(args.html, what, "Choose another file for --html") from error
        print(f"{args.html}: {written} sequences")


def _inspect_token_file(args: argparse.Namespace) -> None:
    from megatron_chameleon.data.preprocess.encode import load_for_encoding
    from megatron_chameleon.data.token_files.reader import open_token_file, read_info
    from megatron_chameleon.data.views.token_file_page import (
        token_file_summary,
        write_token_file_page,
    )
    from megatron_chameleon.errors import ConfigError, DataError

    if args.overrides:
        what = f"{args.prefix} is a token file, which has no values to override"
        raise ConfigError(args.overrides[0], what, "Leave it away, or name a YAML file")
    if args.documents < 1:
        raise ConfigError("--documents", f"{args.documents} is less than 1", "Give a number from 1")
    folder = args.tokenizer or read_info(args.prefix).tokenizer
    try:
        tokenizer = load_for_encoding(folder) if args.html or args.tokenizer else None
    except DataError as error:
        if args.tokenizer:
            raise
        raise DataError(error.where, error.what, "Name the folder with --tokenizer DIR") from error
    token_file = open_token_file(args.prefix, tokenizer)
    if not 0 <= args.start < len(token_file):
        what = f"{args.start}, but {args.prefix} has {len(token_file)} documents"
        raise ConfigError("--start", what, f"Give a number from 0 to {len(token_file) - 1}")
    if args.verify:
        token_file.verify()
        print(f"{args.prefix}: {len(token_file):,} documents fit their index")
    print(token_file_summary(args.prefix, token_file.info, token_file.lengths))
    if args.html and tokenizer is not None:
        try:
            written = write_token_file_page(
                args.html, token_file, tokenizer, args.start, args.documents
            )
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(args.html, what, "Choose another file for --html") from error
        print(f"{args.html}: {written} documents")
