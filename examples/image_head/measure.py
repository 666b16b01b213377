r"""Let models draw digits, let the demo's judge read the drawings, and compare the weights.

    PYTHONPATH=examples/digits python examples/image_head/measure.py \
        runs/digits/exported runs/image_head/spoiled runs/image_head/exported

The models are exported folders: the whole one, the spoiled one and the trained one. The script
fails if training changed anything except the image rows of the output layer.
"""

import argparse
import sys
from pathlib import Path

import torch
from report import Judge, draw_digits
from safetensors.torch import load_file

from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session

NAME = "lm_head.weight"


def share_read(folder: Path, each: int, seed: int) -> float:
    """The share of drawings that the judge reads as the digit that was asked for."""
    options = GenerationOptions(temperature=0.7, top_p=0.9, seed=seed, batch_size=100)
    drawings = draw_digits(Session.load(folder), Judge(), each, options)
    pairs = list(zip(drawings.judged, drawings.labels, strict=True))
    return sum(seen == label for seen, label in pairs) / len(pairs)


def changed_rows(before: Path, after: Path) -> dict[str, int]:
    """How many rows of each tensor differ in any bit."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    found = {
        n: (t.reshape(len(t), -1) != new[n].reshape(len(t), -1)).any(1) for n, t in old.items()
    }
    return {name: int(rows.sum()) for name, rows in found.items() if rows.any()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a model whose image output was trained.")
    for name in ("whole", "spoiled", "trained"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--each", type=int, default=10, help="drawings per digit (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for name in ("whole", "spoiled", "trained"):
        share = share_read(getattr(args, name), args.each, args.seed)
        print(f"{name:8} {100 * share:5.1f}% of {10 * args.each} drawings show the digit asked for")
    changed = changed_rows(args.spoiled, args.trained)
    codes = Session.load(args.trained).tokenizer.vocabulary.image_codes
    print(f"rows that training changed: {changed}; the vocabulary has {codes:,} image codes")
    if changed.keys() != {NAME} or changed[NAME] > codes:
        sys.exit("error: training changed more than the image rows of the output layer")


if __name__ == "__main__":
    main()
