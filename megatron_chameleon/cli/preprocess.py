"""``chameleon preprocess INPUTS... --tokenizer DIR --output PREFIX``: documents to a token file."""

import argparse
import re


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="documents: .jsonl, .jsonl.gz, WebDataset .tar or OBELICS-style .parquet",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument(
        "--output",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, .idx and .json (and .dropped.jsonl for unusable images)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)"
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        default=(0, 1),
        metavar="I/N",
        help="take each N-th document from the I-th on, counted from 0, and write "
        "PREFIX.shard-I-of-N: one job of an array",
    )


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/8"`` to (2, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/8")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.data.preprocess import preprocess

    preprocess(args.inputs, args.tokenizer, args.output, workers=args.workers, shard=args.shard)
