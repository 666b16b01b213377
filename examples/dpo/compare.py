r"""Count the right drawings and captions of models, such as before and after preference tuning.

    PYTHONPATH=examples/digits:examples/sft python examples/dpo/compare.py \
        runs/digits/exported runs/dpo/exported --pictures runs/digits/data
"""

import argparse
import json
from pathlib import Path

from measure import measure_drawings
from report import caption_heldout, read_heldout

from megatron_chameleon.evaluation.tasks.captions import accuracy
from megatron_chameleon.inference.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description="Count right drawings and captions of models.")
    parser.add_argument("models", nargs="+", help="checkpoints, run folders or exported folders")
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="the data folder of the demo"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the figures to this JSON file"
    )
    parser.add_argument("--drawings", type=int, default=20, help="drawings per digit")
    parser.add_argument("--captions", type=int, help="number of held-out pictures (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    images, labels = read_heldout(args.pictures / "heldout.jsonl")
    images, labels = images[: args.captions], labels[: args.captions]
    figures = {}
    for model in args.models:
        session = Session.load(model)
        found = measure_drawings(session, args.drawings, args.seed)
        captions = caption_heldout(session, images, labels)
        found["captions"] = accuracy(captions.digits, labels)
        figures[model] = found
        shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in found.items())
        print(f"{model}: {shares} ({10 * args.drawings} requests, {len(labels)} captions)")
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
