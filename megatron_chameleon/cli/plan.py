"""``chameleon plan CONFIG``: rank the layouts that fit a number of GPUs by predicted speed.

    chameleon plan chameleon_7b --gpus 64 --gpu h100
    chameleon plan examples/chameleon_34b/train.yaml --gpus 512 --gpu h200 fp8.format=hybrid
    chameleon plan chameleon_7b --gpus 1 --gpu rtx4090 training.dtype=bf16 adapter.rank=16
    chameleon plan chameleon_7b --gpus 8 --gpu h200 --json | jq '.plans[0].overrides'

This is a calculation only. It needs no GPU, tokenizer or data.
"""

import argparse
from typing import TYPE_CHECKING

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import CONFIG, COUNT, GIB, GPU_COUNT, add_overrides
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.training.inheriting import load_inheriting

if TYPE_CHECKING:
    from megatron_chameleon.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(parser)
    add_start_from(parser)
    parser.add_argument(
        "--gpus", type=GPU_COUNT, required=True, metavar="N", help="number of GPUs of the job"
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), required=True, help="their type")
    parser.add_argument(
        "--gpu-memory",
        type=GIB,
        metavar="GIB",
        help="their memory, if it is not that of the type (default: as a process sees it there)",
    )
    parser.add_argument(
        "--top", type=COUNT, default=10, metavar="N", help="how many layouts to show (default: 10)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="rank every layout instead of only the best of each TP x PP",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")


def run(args: argparse.Namespace) -> None:
    import json
    from dataclasses import replace

    from megatron_chameleon.cli.config import filled_in, find_vocab_size, with_known_steps
    from megatron_chameleon.config.names import find_config
    from megatron_chameleon.planner.report import as_json, as_text, check_any_fits
    from megatron_chameleon.planner.search import PlanRequest, search_layouts

    config, weights = load_inheriting(find_config(args.config), args.overrides, args.start_from)
    config = with_known_steps(config, weights)
    vocab_size, _ = find_vocab_size(config, weights)
    gpu, config = GPUS[args.gpu], filled_in(config)
    if args.gpu_memory:
        gpu = replace(gpu, memory_gib=args.gpu_memory)
    request = PlanRequest(config, vocab_size, args.gpus, gpu, _with_gradient(config, vocab_size))
    with announced(f"comparing the layouts of {args.gpus} GPUs"):
        result = search_layouts(request)
    check_any_fits(result)
    if args.json:
        show(json.dumps(as_json(result, args.top), indent=1))
    else:
        show(as_text(result, args.top, args.all))


def _with_gradient(config: "Config", vocab_size: int) -> dict[str, int] | None:
    """The elements of the parameters that have a gradient, where patterns choose them."""
    if not config.model.train and not config.model.freeze:
        return None
    from megatron_chameleon.model.tuning.selection import select_trained  # imports torch

    # Which rows are those of images does not matter: a tensor has a gradient as a whole.
    return select_trained(config, vocab_size, image_ids=[0]).with_gradient
