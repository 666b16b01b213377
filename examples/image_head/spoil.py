r"""Draw the image rows of an exported model's output layer anew, as if it could not draw.

    python examples/image_head/spoil.py runs/digits/exported runs/image_head/spoiled

The released models read images, but their weights do not let them write any. This makes a model of
the digits demo that is like them.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_chameleon.tokenizer.folder import load_tokenizer

NAME = "lm_head.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoil the image output of an exported model.")
    parser.add_argument("source", type=Path, help="a folder that `chameleon convert --to hf` wrote")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--std", type=float, default=0.06, help="standard deviation of the rows")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shutil.copytree(args.source, args.target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    rows = torch.from_numpy(load_tokenizer(args.source).vocabulary.code_token_ids.copy())
    file = args.target / "model.safetensors"
    tensors = load_file(file)
    head = tensors[NAME]
    generator = torch.Generator().manual_seed(args.seed)
    drawn = torch.empty(len(rows), head.shape[1]).normal_(0, args.std, generator=generator)
    head[rows] = drawn.to(head.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    print(f"drew {len(rows):,} of {len(head):,} rows of {NAME} anew")


if __name__ == "__main__":
    main()
