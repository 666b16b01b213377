"""``chameleon plan CONFIG``: the layouts that fit so many GPUs, by their predicted speed.

    chameleon plan chameleon_7b --gpus 64 --gpu h100
    chameleon plan examples/chameleon_34b/train.yaml --gpus 512 --gpu h200 fp8.format=hybrid
    chameleon plan chameleon_7b --gpus 8 --gpu h200 --json | jq '.plans[0].overrides'

It computes only: no GPU, tokenizer or data need to be there.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that win over the file's"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job")
    parser.add_argument("--gpu", choices=("h200", "h100", "a100"), required=True)
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="layouts to show (default: 10)"
    )
    parser.add_argument(
        "--all", action="store_true", help="rank every layout, not the best of each TP x PP"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def run(args: argparse.Namespace) -> None:
    import json

    from megatron_chameleon.cli.config import filled_in, find_vocab_size
    from megatron_chameleon.config.load import find_config, load_config
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.planner.gpus import GPUS
    from megatron_chameleon.planner.report import as_json, as_text, check_any_fits
    from megatron_chameleon.planner.search import PlanRequest, search_layouts

    for option, value in (("--gpus", args.gpus), ("--top", args.top)):
        if value < 1:
            raise ConfigError(option, f"{value} is below 1", "Give a number above 0")
    config = load_config(find_config(args.config), args.overrides)
    vocab_size, _ = find_vocab_size(config)
    result = search_layouts(PlanRequest(filled_in(config), vocab_size, args.gpus, GPUS[args.gpu]))
    check_any_fits(result)
    if args.json:
        print(json.dumps(as_json(result, args.top), indent=1))
    else:
        print(as_text(result, args.top, args.all))
