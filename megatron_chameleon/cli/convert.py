"""``chameleon convert SRC DST --to FORMAT``: turn a checkpoint into another format."""

import argparse
import os
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import FILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a step_... folder, a run folder (its newest complete checkpoint), a folder in "
        "Hugging Face's, Meta's or DeepSpeed's format, or an adapter in peft's",
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
        help="data type of the tensors (default: the checkpoint's)",
    )
    parser.add_argument(
        "--shards",
        type=FILES,
        metavar="N",
        help="number of files in Meta's format (default: as few as the QK-norms allow)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer folder, ours or Meta's (default: the checkpoint's)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="write the moving average of the weights (training.ema_decay) as the weights, in fp32 "
        "unless --dtype says otherwise",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a run with an adapter, write the weights with the adapter in them; without it, "
        "--to hf writes the adapter alone, as a folder of peft",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="with --merge: where the adapter's base weights are (default: where they were)",
    )
    parser.add_argument("--no-optimizer", action="store_true", help="omit the optimizer state")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, the sizes and what is needed; write nothing",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the files back to compare them"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    # read by torch when it is imported: allocate in large pages, which takes half the time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_chameleon.checkpoint.convert.adapter import export_adapter, find_source_adapter
    from megatron_chameleon.checkpoint.convert.plan import plan_conversion
    from megatron_chameleon.checkpoint.convert.run import convert
    from megatron_chameleon.errors import CheckpointError, ConfigError
    from megatron_chameleon.outputs import check_name

    check_name("the destination", args.destination, CheckpointError)
    source, destination = Path(args.source), Path(args.destination)
    adapter = find_source_adapter(source, args.to, merge=args.merge, ema=args.ema)
    if adapter is not None:
        _refuse_options(args)
        exported = export_adapter(adapter, destination, progress)
        show(
            f"{adapter.where} -> {destination}: an adapter of rank {adapter.config.rank}, "
            f"{exported.parameters:,} parameters, {exported.total_bytes:,} bytes, verified bit for "
            "bit; --merge writes the whole model"
        )
        return
    if args.base and not args.merge:
        what = "it goes with --merge only"
        raise ConfigError(f"--base {args.base}", what, "Add --merge, or leave it out")
    options = {
        "base": args.base,
        "dtype": args.dtype,
        "shards": args.shards,
        "tokenizer_folder": args.tokenizer,
        "optimizer": not args.no_optimizer,
        "ema": args.ema,
    }
    if args.dry_run:
        with announced(f"reading {args.source}"):
            plan = plan_conversion(args.source, args.destination, args.to, **options)
        show(plan.text())
        return
    result = convert(
        args.source,
        args.destination,
        args.to,
        **options,
        verify=not args.no_verify,
        progress=progress,
    )
    show(
        f"{result.source} (step {result.step:,}) -> {result.destination}: "
        f"{result.parameters:,} parameters, {result.total_bytes:,} bytes, {result.seconds:.1f} s, "
        + (
            f"verified bit for bit in {result.verify_seconds:.1f} s"
            if result.verified
            else "not verified"
        )
    )
    show(result.optimizer)
    if result.largest_change:
        change, name = result.largest_change
        show(f"largest relative change by the cast to {args.dtype}: {change:.3g}, in {name}")


def _refuse_options(args: argparse.Namespace) -> None:
    """Refuse what has no meaning for an adapter that is written by itself."""
    from megatron_chameleon.errors import ConfigError

    given = {"--dtype": args.dtype, "--shards": args.shards, "--tokenizer": args.tokenizer}
    given |= {"--base": args.base, "--dry-run": args.dry_run}
    for option, value in given.items():
        if value:
            what = f"{args.source} is an adapter, which is written as it is"
            raise ConfigError(option, what, "Leave it out, or add --merge")
