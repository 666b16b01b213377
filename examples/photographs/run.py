"""Train small image tokenizers on real photographs, and compare them with JPEG and WebP.

    python -m examples.photographs.run --output runs/photographs

Each perceptual loss is one training of the same steps, seed and pictures. Every figure is of
pictures that no training saw: crops of held-out regions and of held-out photographs. JPEG and WebP
get as many bytes per picture as the codes take, once with their headers and tables and once
without. A training takes about six minutes on one CPU core. Needs the extras [demo] and [faces].
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from examples.photographs.codecs import best_within, jpeg, payload_bytes, scan_bytes, webp
from examples.photographs.pictures import write_crops
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer

HERE = Path(__file__).parent
PARTS = ("regions", "photographs")
CODECS = {
    "JPEG, whole file": (jpeg, len),
    "JPEG, scan alone": (jpeg, scan_bytes),
    "WebP, whole file": (webp, len),
    "WebP, picture alone": (webp, payload_bytes),
}


def main(words: Sequence[str] | None = None) -> None:
    """Make the pictures, train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--losses", nargs="+", default=["none", "spectral", "wavelet"])
    parser.add_argument("--crops", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=150, help="crops in each of two parts")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    args = parser.parse_args(words)
    if not (args.output / "photographs").exists():
        write_crops(args.output, args.crops, args.held_out)
    pictures = {part: _pictures(args.output / part) for part in PARTS}
    rows: dict[str, list[str]] = {}
    budget = 0
    for loss in args.losses:
        folder, start = args.output / f"tokenizer-{loss}", time.perf_counter()
        if not (folder / "image.json").exists():
            _train(args.output / "train", folder, [f"training.perceptual={loss}", *args.overrides])
        tokenizer = ImageTokenizer.load(folder)
        bits = tokenizer.codes_per_image * math.log2(tokenizer.codebook_size)
        budget = math.ceil(bits / 8)
        row, used = [], set()
        for part in PARTS:
            codes = tokenizer.encode(pictures[part])
            used.update(codes.flatten().tolist())
            decoded = [np.asarray(image) for image in tokenizer.decode(codes)]
            row += _figures(pictures[part], decoded)
        trained = json.loads((folder / "image.json").read_text())["result"]["codes_used"]
        share = 100 / tokenizer.codebook_size
        row.append(f"{len(used) * share:.0f}% / {trained * share:.0f}%")
        rows[f"ours, perceptual={loss}"] = [*row, f"{time.perf_counter() - start:.0f} s"]
    for name, (coder, count) in CODECS.items():
        row = []
        for part in PARTS:
            found = [best_within(image, budget, coder, count) for image in pictures[part]]
            fitting = [image for image in found if image is not None]
            fits = len(fitting) == len(found)
            row += _figures(pictures[part], fitting) if fits else ["does not fit", ""]
        rows[name] = [*row, "", ""]
    print(f"{budget} bytes per picture of 64 x 64; {len(pictures['regions'])} held-out crops each")
    head = ["", *(f"{part}, {unit}" for part in PARTS for unit in ("PSNR", "SSIM"))]
    _print_row([*head, "codes used, held out / trained on", "time"])
    _print_row(["---"] * 7)
    for name, row in rows.items():
        _print_row([name, *row])


def _train(images: Path, output: Path, words: Sequence[str]) -> None:
    command = [sys.executable, "-m", "megatron_chameleon", "tokenizer", "image", str(images)]
    command += ["--output", str(output), "--config", str(HERE / "photographs.yaml"), *words]
    subprocess.run(command, check=True)


def _pictures(folder: Path) -> list[Image.Image]:
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found.append(image.convert("RGB"))
    return found


def _figures(originals: Sequence[Image.Image], decoded: Sequence[np.ndarray]) -> list[str]:
    """PSNR of the mean squared error, and the mean SSIM."""
    pairs = [(np.asarray(a), b) for a, b in zip(originals, decoded, strict=True)]
    error = np.mean([np.square(a.astype(float) - b).mean() for a, b in pairs])
    ssim = np.mean([structural_similarity(a, b, channel_axis=2) for a, b in pairs])
    return [f"{10 * math.log10(255**2 / max(error, 1e-9)):.2f} dB", f"{ssim:.3f}"]


def _print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
