"""``chameleon convert SRC DST --to hf``: turn a training checkpoint into a Hugging Face folder."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("source", help="a step_... folder, or a run folder (its newest whole step)")
    parser.add_argument("destination", help="a folder that does not exist yet")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="target format: hf")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the tensors (default: as in the checkpoint)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer folder (default: as in the checkpoint)"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the files back and compare"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    from megatron_chameleon.checkpoint.convert import check_format, convert_to_hf

    check_format(args.to)
    result = convert_to_hf(
        args.source,
        args.destination,
        dtype=args.dtype,
        tokenizer_folder=args.tokenizer,
        verify=not args.no_verify,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(
        f"{result.source} (step {result.step:,}) -> {result.destination}: "
        f"{result.parameters:,} parameters, {result.total_bytes:,} bytes, {result.seconds:.1f} s, "
        + ("verified bit for bit" if result.verified else "not verified")
    )
