"""Make a few hundred small icons with names: too few to learn from without learning them by heart.

    python examples/icons/make_documents.py --output runs/icons/data

An icon is a shape in a colour on a background. Its caption says both, which a model can learn, and
gives it a name of its own, which it can only learn by heart. Every fifth icon is held out.
"""

import argparse
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 28
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLORS = {
    "red": (205, 50, 50),
    "green": (50, 150, 70),
    "blue": (50, 90, 200),
    "yellow": (225, 185, 40),
    "purple": (130, 60, 160),
    "black": (30, 30, 30),
}
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "sa", "to", "vu", "ze")
HELD_OUT_EVERY = 5


def draw_icon(shape: str, color: tuple[int, int, int], draw: random.Random) -> Image.Image:
    """An icon of ``SIZE`` pixels, with a place and a radius of its own."""
    scale = 4  # drawn larger and scaled down, so that its edges are smooth
    shade = draw.randint(215, 255)
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    radius = draw.uniform(0.24, 0.4) * SIZE * scale
    x, y = (draw.uniform(radius, SIZE * scale - radius) for _ in "xy")
    box = (x - radius, y - radius, x + radius, y + radius)
    corners = {"triangle": (3, -90, 1.0), "diamond": (4, -90, 1.0), "star": (10, -90, 0.45)}
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=round(radius * 0.4))
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "cross":
        for dx, dy in ((0.3, 1.0), (1.0, 0.3)):
            pen.rectangle(
                (x - dx * radius, y - dy * radius, x + dx * radius, y + dy * radius), color
            )
    elif shape == "heart":
        half = radius / 2
        for side in (-half, half):
            pen.ellipse((x + side - half, y - radius, x + side + half, y), fill=color)
        pen.polygon([(x - radius, y - half), (x + radius, y - half), (x, y + radius)], fill=color)
    else:
        count, first, inner = corners[shape]
        angles = [math.radians(first + 360 * n / count) for n in range(count)]
        sizes = [radius * (inner if n % 2 else 1.0) for n in range(count)]
        points = zip(angles, sizes, strict=True)
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in points], fill=color)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--icons", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"trained": [], "held_out": []}
    for number in range(args.icons):
        shape, color = draw.choice(SHAPES), draw.choice(list(COLORS))
        name = "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()
        image = f"images/{number:04d}.png"
        draw_icon(shape, COLORS[color], draw).save(args.output / image)
        content = [
            {"type": "image", "image": image},
            {"type": "text", "text": f"a {color} {shape} called {name}"},
        ]
        document = {"id": f"{number:04d}", "source": "icons", "content": content}
        kind = "trained" if (number + 1) % HELD_OUT_EVERY else "held_out"
        lines[kind].append(json.dumps(document) + "\n")
    for kind, documents in lines.items():
        (args.output / f"{kind}.jsonl").write_text("".join(documents), encoding="utf-8")
        print(f"{args.output / kind}.jsonl: {len(documents)} icons")


if __name__ == "__main__":
    main()
