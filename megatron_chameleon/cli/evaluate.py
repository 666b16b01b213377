r"""``chameleon evaluate CHECKPOINT --tasks NAME,...``: benchmark a checkpoint of any format.

chameleon evaluate --tasks list
chameleon evaluate exported --tasks piqa,arc_easy,mmlu --output scores --data benchmarks
chameleon evaluate runs/digits --tasks examples/digits/captions.yaml \
    --data runs/digits/data --output runs/digits/scores

If it is killed, the same command continues from the answers that it has already stored.
"""

import argparse
from pathlib import Path

from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import (
    BATCH,
    COUNT,
    SEED,
    add_ema_option,
    add_image_options,
    add_tokenizer_option,
    device,
    image_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", help="a checkpoint, run folder or converted folder of any format"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        required=True,
        help="names of tasks or FILE.yaml, separated by commas; `list` prints all names with the "
        "paper's figures",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for results.json, samples.jsonl and a page"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder with local data (default: the hub, text tasks only)"
    )
    parser.add_argument(
        "--limit", type=COUNT, metavar="N", help="use only the first N items per task"
    )
    parser.add_argument(
        "--seed", type=SEED, default=1, help="seed of the shots and of sampling (default: 1)"
    )
    parser.add_argument(
        "--batch-size", type=BATCH, default=32, help="prompts to answer together (default: 32)"
    )
    add_tokenizer_option(parser)
    add_ema_option(parser)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Run the tasks and print the table."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.tasks.catalogue import listing

    if args.tasks == "list":
        show(listing())
        return
    for name, value in (("CHECKPOINT", args.checkpoint), ("--output", args.output)):
        if not value:
            raise ConfigError(
                name, "is missing", f"Add it to chameleon evaluate --tasks {args.tasks}"
            )

    from megatron_chameleon.announce import announced
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.evaluation.runner import PAGE_FILE, RESULTS_FILE, load_tasks, run_tasks
    from megatron_chameleon.evaluation.tasks.results import results_table
    from megatron_chameleon.inference.session import Session
    from megatron_chameleon.outputs import check_output_folder

    data = Path(args.data) if args.data else None
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks", "names no task", "Give names, or FILE.yaml")
    images = image_options(args)
    with announced(f"reading {args.tasks}"):
        runs = load_tasks(names, data, args.limit, args.seed, args.batch_size, images)
    output = check_output_folder("--output", args.output)
    session = Session.load(args.checkpoint, args.device, args.tokenizer, ema=args.ema)
    name = f"{args.checkpoint} (EMA of the weights)" if args.ema else args.checkpoint
    origin = page_origin(args, seed=args.seed)
    results = run_tasks(session, name, runs, output, progress, origin=origin)
    show(results_table(results["tasks"]))
    progress(f"written: {output / RESULTS_FILE}, and a page: {output / PAGE_FILE}")
