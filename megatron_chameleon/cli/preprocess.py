"""``chameleon preprocess INPUTS... --tokenizer DIR --output PREFIX``: turn documents into tokens.

chameleon preprocess 'web/*.jsonl.zst' --tokenizer tok --output tokens/web --workers 16
chameleon preprocess ... --shard $SLURM_ARRAY_TASK_ID/64      # one job of a job array
chameleon preprocess --output tokens/web --status             # progress of all shards
chameleon preprocess --output tokens/web --merge              # when all shards are done
mpiexec -n 64 chameleon preprocess ...                        # shards and merge in one command
"""

import argparse
import re
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    MIB,
    PART,
    SECONDS,
    SHARE,
    WORKERS,
    add_image_options,
    image_options,
)
from megatron_chameleon.cli.tokenizer_folders import TOKENIZER, tokenizer_folder
from megatron_chameleon.images.fit import DEFAULT_IMAGE_FIT, IMAGE_FITS
from megatron_chameleon.wording import counted, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="documents: .jsonl (also .gz or .zst), WebDataset .tar or OBELICS-style .parquet; "
        "paths, globs or URLs",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help=TOKENIZER)
    parser.add_argument(
        "--output",
        required=True,
        metavar="PREFIX",
        help="write PREFIX.bin, .idx, .documents, .images and .json, also .answers for "
        "conversations, and .dropped.jsonl, which lists bad documents",
    )
    parser.add_argument(
        "--workers",
        type=WORKERS,
        default=1,
        metavar="N",
        help="number of processes that encode (default: 1)",
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="read only the I-th of N parts of the input, counted from 0, and write "
        "PREFIX.shard-I-of-N; for one job of a job array",
    )
    parser.add_argument(
        "--status", action="store_true", help="show the progress of PREFIX and its shards, and exit"
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the finished shards into PREFIX, and exit"
    )
    parser.add_argument(
        "--keep-shards", action="store_true", help="do not delete the shards after merging them"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start from the beginning and discard what an earlier run wrote",
    )
    _add_content_arguments(parser)


def _add_content_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad",
        type=SHARE,
        default=1.0,
        metavar="SHARE",
        help="stop when more than this share of the documents is bad (default: 1, never)",
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="source of all documents; replaces the one that each document names",
    )
    parser.add_argument(
        "--image-cache",
        metavar="DIR",
        help="folder in which image codes are cached by image content",
    )
    parser.add_argument(
        "--image-fit",
        choices=IMAGE_FITS,
        default=DEFAULT_IMAGE_FIT,
        help="how images become square. role (the default): padded with a border in prompts of "
        "conversations and cropped elsewhere; crop: always cropped; pad: always padded",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where images are encoded (default: on a GPU if there is one)",
    )
    parser.add_argument(
        "--image-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 is the default. bf16 is several times as fast on a GPU, but changes about one "
        "image code in a hundred",
    )
    add_image_options(parser)
    _add_limits(parser)
    _add_holdout(parser)
    parser.add_argument(
        "--ignore-keys",
        metavar="KEY,...",
        default="",
        help="keys or columns to leave out, for example one that holds masks: a picture in a key "
        "that is not read otherwise drops the document",
    )
    parser.add_argument(
        "--save-every",
        type=SECONDS,
        default=10.0,
        metavar="SECONDS",
        help="save this often, so that a kill loses at most so much work (default: 10)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--largest-document",
        type=MIB,
        default=128,
        metavar="MIB",
        help="drop a line, sample or row with more MiB than this, images included (default: 128)",
    )
    parser.add_argument(
        "--largest-text",
        type=MIB,
        default=16,
        metavar="MIB",
        help="drop a document with more MiB of text than this; encoding takes about 30 times as "
        "much memory (default: 16)",
    )


def _add_holdout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--holdout",
        type=PART,
        metavar="SHARE",
        help="write this share of the documents, chosen by a hash of what they are, to "
        "PREFIX-holdout instead, such as 0.01; the same document or picture never lies on both "
        "sides",
    )


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/8"`` to (2, 8)."""
    match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not of the form I/N, such as 0/8")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.errors import ConfigError

    if args.status:
        from megatron_chameleon.data.preprocess.progress import status_table

        show(status_table(args.output))
        return
    if args.merge:
        from megatron_chameleon.data.preprocess.merge_shards import merge_shards

        merge_shards(args.output, args.keep_shards, tokenizer_folder)
        return
    if not args.inputs:
        raise ConfigError("INPUT", "no documents are given", "Give files, globs or URLs")
    if args.tokenizer is None:
        raise ConfigError("--tokenizer", "is missing", f"Name {TOKENIZER}")
    what = f"preparing to encode {counted(len(args.inputs), 'input')}"
    with announced(what), tokenizer_folder(args.tokenizer) as folder:
        _preprocess(args, folder)


def _preprocess(args: argparse.Namespace, tokenizer: Path) -> None:
    from megatron_chameleon.data.inputs.records import Limits
    from megatron_chameleon.data.preprocess.options import EncodeOptions, PreprocessOptions
    from megatron_chameleon.data.preprocess.run import preprocess
    from megatron_chameleon.parallel.launch import find_launch

    options = PreprocessOptions(
        workers=args.workers,
        shard=args.shard or (0, 1),
        max_bad=args.max_bad,
        restart=args.restart,
        save_seconds=args.save_every,
        encoding=EncodeOptions(
            device=args.device,
            image_cache=args.image_cache,
            corpus_name=args.source,
            image_fit=args.image_fit,
            image_dtype=args.image_dtype,
            ignored_keys=tuple(sorted({key for key in args.ignore_keys.split(",") if key})),
            limits=Limits(args.largest_document << 20, args.largest_text << 20),
            images=image_options(args),
            holdout=args.holdout,
            tokenizer_name=args.tokenizer,
        ),
    )
    launch = find_launch()
    if launch.world_size > 1 and args.shard is None and launch.launcher != "torchrun":
        from megatron_chameleon.data.preprocess.mpi import preprocess_on_ranks

        preprocess_on_ranks(
            args.inputs, tokenizer, args.output, options, launch, keep=args.keep_shards
        )
    else:
        preprocess(args.inputs, tokenizer, args.output, options)
