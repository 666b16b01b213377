"""``chameleon verify A B``: compare two checkpoints of any format, tensor by tensor.

``chameleon verify A`` compares the files of one checkpoint with its checksums.
"""

import argparse
import os
from pathlib import Path

from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import TOLERANCE
from megatron_chameleon.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a checkpoint of any format")
    parser.add_argument(
        "second",
        nargs="?",
        help="the checkpoint to compare it with; without one, the files of the first are compared "
        "with its SHA256SUMS",
    )
    parser.add_argument(
        "--tolerance",
        type=TOLERANCE,
        default=0.0,
        metavar="X",
        help="largest allowed difference, as a share of a tensor's largest number (default: 0)",
    )

    parser.add_argument(
        "--ema",
        action="store_true",
        help="compare the moving average of the first checkpoint's weights",
    )


def run(args: argparse.Namespace) -> None:
    """Compare. The exit code is 0 if nothing differs, and 2 otherwise."""
    if args.second is None and args.ema:
        from megatron_chameleon.errors import ConfigError

        remedy = "Give a second checkpoint, or leave it out"
        raise ConfigError("--ema", "is about a comparison of two checkpoints", remedy)
    if args.second is None:
        _check_files(args.first)
        return
    # read by torch when it is imported: allocate in large pages, which takes half the time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_chameleon.checkpoint.convert.verify import SHOWN_DIFFERENCES, verify
    from megatron_chameleon.errors import CheckpointError

    result = verify(
        args.first,
        args.second,
        tolerance=args.tolerance,
        ema=args.ema,
        progress=progress,
    )
    for difference in result.differences[:SHOWN_DIFFERENCES]:
        show(difference)
    if count := len(result.differences):
        raise CheckpointError(
            str(args.second),
            f"differs from {args.first} in {count} place{'s' if count > 1 else ''}, the first is "
            f"{result.differences[0].name}",
            "Convert again, or allow differences with --tolerance",
        )
    largest = (
        "bit for bit or in value"
        if result.largest == 0
        else f"up to {result.largest:.3g} (in {result.largest_name})"
    )
    show(
        f"equal: {result.first.folder} ({result.first.format}) and {result.second.folder} "
        f"({result.second.format}): {result.tensors:,} tensors, {result.parameters:,} parameters "
        f"{largest}; optimizer state {'equal too' if result.optimizer else 'not compared'}; logits "
        + ("not computed" if result.logits is None else f"within {result.logits:.3g}")
        + f"; tokenizers {result.tokenizers}"
    )


def _check_files(checkpoint: str) -> None:
    from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
    from megatron_chameleon.checkpoint.state.integrity import SUMS_FILE, check_files
    from megatron_chameleon.errors import CheckpointError

    folder = Path(checkpoint)
    if not (folder / SUMS_FILE).is_file():  # for example a run folder
        folder = open_checkpoint(folder).folder
    files = check_files(folder)
    if files is None:
        what = f"has no {SUMS_FILE} to compare its files with"
        remedy = "Give a second checkpoint to compare the tensors of both"
        raise CheckpointError(str(folder), what, remedy)
    show(f"whole: {folder}: {counted(files, 'file')} checked against SHA-256 sums")
