"""Make pictures of three aspect ratios, with captions that name the ratio, the colour and the form.

    python examples/shapes/make_pictures.py --output runs/shapes/data

OUTPUT/documents.jsonl has one document for each picture, of a caption and the picture, and
OUTPUT/pictures/ has the PNG files. Half of the time the picture comes first.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

RATIOS = {"wide": (2, 1), "square": (1, 1), "tall": (1, 2)}
"""The word of a caption, and width and height that it stands for."""
SIZES = {"wide": (32, 16), "square": (20, 20), "tall": (16, 32)}
"""In pixels."""
COLOURS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (30, 80, 200)}
FORMS = ("circle", "bar")
PAPER = (250, 248, 240)


def caption(ratio: str, colour: str, form: str) -> str:
    """What is said of a picture, and what asks for one."""
    return f"a {ratio} picture of a {colour} {form}"


def drawn(ratio: str, colour: str, form: str, rng: random.Random) -> Image.Image:
    """A picture: a form of one colour somewhere near the middle."""
    width, height = SIZES[ratio]
    picture = Image.new("RGB", (width, height), PAPER)
    radius = min(width, height) * rng.uniform(0.28, 0.38)
    x = width / 2 + rng.uniform(-0.15, 0.15) * (width - 2 * radius)
    y = height / 2 + rng.uniform(-0.15, 0.15) * (height - 2 * radius)
    draw, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if form == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    else:  # along the longer side
        across, down = (1.0, 0.4) if width >= height else (0.4, 1.0)
        long = 0.42 * max(width, height)
        x_half, y_half = long * across, long * down
        draw.rectangle((x - x_half, y - y_half, x + x_half, y + y_half), fill)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1800, help="pictures (default: 1800)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = args.output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(args.count):
        words = (rng.choice([*RATIOS]), rng.choice([*COLOURS]), rng.choice(FORMS))
        name = f"pictures/{number:05d}.png"
        drawn(*words, rng).save(args.output / name)
        parts = [
            {"type": "text", "text": caption(*words)},
            {"type": "image", "image": name},
        ]
        content = parts[::-1] if rng.random() < 0.2 else parts
        lines.append(json.dumps({"id": f"{number:05d}", "source": "shapes", "content": content}))
    (args.output / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.count:,} pictures in {args.output}")


if __name__ == "__main__":
    main()
