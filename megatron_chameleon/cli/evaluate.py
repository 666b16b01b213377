r"""``chameleon evaluate CHECKPOINT --tasks NAME,...``: benchmark a checkpoint of any format.

chameleon evaluate --tasks list
chameleon evaluate exported --tasks piqa,arc_easy,mmlu --output scores --data benchmarks
chameleon evaluate runs/digits --tasks examples/digits/captions.yaml \
    --data runs/digits/data --output runs/digits/scores

Killed, the same command goes on from the answers that are there.
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "checkpoint", nargs="?", help="a checkpoint, run folder or converted folder of any format"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        required=True,
        help="names or FILE.yaml, with commas between; `list` shows them with the paper's figures",
    )
    parser.add_argument("--output", metavar="DIR", help="for results.json and samples.jsonl")
    parser.add_argument("--data", metavar="DIR", help="local data (default: the hub, texts only)")
    parser.add_argument("--limit", type=int, metavar="N", help="items of a task (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of shots and of drawn answers")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts answered together")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: as in the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> None:
    """Run the tasks and print the table."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.tasks.catalogue import listing

    if args.tasks == "list":
        print(listing())
        return
    for name, value in (("CHECKPOINT", args.checkpoint), ("--output", args.output)):
        if not value:
            raise ConfigError(
                name, "is missing", f"Give it: chameleon evaluate --tasks {args.tasks}"
            )
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(option, f"{value} is below 1", "Give a number from 1")

    from megatron_chameleon.evaluation.runner import RESULTS_FILE, load_tasks, run_tasks
    from megatron_chameleon.evaluation.tasks.results import results_table
    from megatron_chameleon.inference.session import Session

    data = Path(args.data) if args.data else None
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    runs = load_tasks(names, data, args.limit, args.seed, args.batch_size)
    session = Session.load(args.checkpoint, args.device, args.tokenizer)
    results = run_tasks(session, args.checkpoint, runs, Path(args.output), _report)
    print(results_table(results["tasks"]))
    print(f"written: {Path(args.output) / RESULTS_FILE}", file=sys.stderr)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
