"""``chameleon inspect PREFIX --html FILE``: what is in a token file, as the model will see it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="token file, without .bin and .idx")
    parser.add_argument("--html", metavar="FILE", help="also write documents as an HTML page")
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


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.data.encode import load_for_encoding
    from megatron_chameleon.data.indexed import open_token_file, read_info
    from megatron_chameleon.data.viewer import summary, write_html
    from megatron_chameleon.errors import ConfigError, DataError

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
    print(summary(args.prefix, token_file.info, token_file.lengths))
    if args.html and tokenizer is not None:
        try:
            written = write_html(args.html, token_file, tokenizer, args.start, args.documents)
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(args.html, what, "Choose another file for --html") from error
        print(f"{args.html}: {written} documents")
