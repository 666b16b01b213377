"""``chameleon convert SRC DST --to FORMAT``: turn a checkpoint into another format."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "source",
        help="a step_... or run folder (its newest whole step), a Hugging Face folder, Meta's, or "
        "DeepSpeed's",
    )
    parser.add_argument("destination", help="a folder that does not exist yet")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="target format: megatron, hf, meta or deepspeed",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the tensors (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="files of Meta's format (default: as few as the QK-norms allow)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer folder, ours or Meta's (default: as in the checkpoint)",
    )
    parser.add_argument("--no-optimizer", action="store_true", help="leave optimizer state out")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, sizes and needs; write nothing"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the files back and compare"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    # torch reads it when it is imported: memory in large pages, which costs half as much to get
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_chameleon.checkpoint.convert.plan import plan_conversion
    from megatron_chameleon.checkpoint.convert.run import convert

    options = {
        "dtype": args.dtype,
        "shards": args.shards,
        "tokenizer_folder": args.tokenizer,
        "optimizer": not args.no_optimizer,
    }
    if args.dry_run:
        print(plan_conversion(args.source, args.destination, args.to, **options).text())
        return
    result = convert(
        args.source,
        args.destination,
        args.to,
        **options,
        verify=not args.no_verify,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(
        f"{result.source} (step {result.step:,}) -> {result.destination}: "
        f"{result.parameters:,} parameters, {result.total_bytes:,} bytes, {result.seconds:.1f} s, "
        + (
            f"verified bit for bit in {result.verify_seconds:.1f} s"
            if result.verified
            else "not verified"
        )
    )
    print(result.optimizer)
    if result.largest_change:
        change, name = result.largest_change
        print(f"largest relative change by the cast to {args.dtype}: {change:.3g}, in {name}")
