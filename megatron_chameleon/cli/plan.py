"""``chameleon plan CONFIG``: rank the layouts that fit a number of GPUs by predicted speed.

    chameleon plan chameleon_7b --gpus 64 --gpu h100
    chameleon plan examples/chameleon_34b/train.yaml --gpus 512 --gpu h200 fp8.format=hybrid
    chameleon plan chameleon_7b --gpus 8 --gpu h200 --json | jq '.plans[0].overrides'

This is a calculation only. It needs no GPU, tokenizer or data.
"""

import argparse

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import CONFIG, COUNT, GPU_COUNT, add_overrides
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.training.inheriting import load_inheriting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(parser)
    add_start_from(parser)
    parser.add_argument(
        "--gpus", type=GPU_COUNT, required=True, metavar="N", help="number of GPUs of the job"
    )
    parser.add_argument("--gpu", choices=("h200", "h100", "a100"), required=True, help="their type")
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

    from megatron_chameleon.cli.config import filled_in, find_vocab_size, with_known_steps
    from megatron_chameleon.config.names import find_config
    from megatron_chameleon.planner.gpus import GPUS
    from megatron_chameleon.planner.report import as_json, as_text, check_any_fits
    from megatron_chameleon.planner.search import PlanRequest, search_layouts

    config, weights = load_inheriting(find_config(args.config), args.overrides, args.start_from)
    config = with_known_steps(config, weights)
    vocab_size, _ = find_vocab_size(config, weights)
    request = PlanRequest(filled_in(config), vocab_size, args.gpus, GPUS[args.gpu])
    with announced(f"comparing the layouts of {args.gpus} GPUs"):
        result = search_layouts(request)
    check_any_fits(result)
    if args.json:
        show(json.dumps(as_json(result, args.top), indent=1))
    else:
        show(as_text(result, args.top, args.all))
