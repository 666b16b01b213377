"""Make documents of handwritten digits: captioned pairs, sums, texts and conversations.

    python examples/digits/make_documents.py --output runs/digits/data

The 1,797 digits are real. They come from scikit-learn's ``load_digits`` (UCI, 8 x 8 pixels) and are
scaled up. The same fifth of them is always held out and appears only in heldout.jsonl.

The first digit in each caption, a word or a numeral, names the picture. A model's captions can thus
be scored by reading them. ``label`` in a document has the digit too, but training does not see it.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chats import SHAPES, WORDS, Chats, fill
from PIL import Image
from sklearn.datasets import load_digits

CANONICAL = ("a handwritten {word}", "the digit {word}", "this is the number {word}")
"""The phrasings that are used in prompts."""
CAPTIONS = (
    *CANONICAL,
    "{a} {word}",
    "{a} {word} written by hand",
    "a picture of {a} {word}",
    "the number {word}, written in ink",
    "a small drawing of the digit {word}",
    "written here: {a} {word}",
    "a scan of the numeral {digit}",
    "handwriting: {digit}",
    "the digit {digit}, also called {word}",
    "the image shows {a} {word}",
    "here we see the number {digit}",
    "a pen stroke in the shape of {a} {word}",
    "black ink on white paper, it reads {word}",
    "What digit is this? It is {a} {word}.",
    "This is how a person writes {word}, the numeral {digit}.",
    "This figure is {a} {word}, it {shape}.",
)
SUMS = (
    "{left} plus {right} is {total}.",
    "{left} and {right} make {total}.",
    "Take {left} and add {right}. You get {total}.",
    "What is {left} plus {right}? It is {total}.",
    "First comes {left}, then comes {right}. Their sum is {total}.",
    "Add {left} to {right} and the result is {total}.",
)
SPLIT_SEED = 1797
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Picture:
    """A picture of a digit in the output folder."""

    id: str
    label: int
    path: str
    """Relative to the output folder."""
    variant: int
    """0 is the original digit; other variants are slightly rotated, shifted and scaled."""


# Pictures


def write_pictures(output: Path, variants: int, size: int, seed: int) -> tuple[list[Picture], ...]:
    """Write all pictures, and return those for training and those that are held out."""
    digits = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
    held_out = set(order[: round(HELD_OUT_SHARE * len(order))].tolist())
    training, heldout = [], []
    for name in ("train_images", "heldout_images"):
        (output / name).mkdir(parents=True, exist_ok=True)
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = render(pixels, size)
        if index in held_out:
            identity = f"heldout-{index:04d}"
            picture = Picture(identity, int(label), f"heldout_images/{identity}.png", 0)
            image.save(output / picture.path)
            heldout.append(picture)
            continue
        for variant in range(variants):
            identity = f"train-{index:04d}-{variant}"
            picture = Picture(identity, int(label), f"train_images/{identity}.png", variant)
            changed = vary(image, random.Random(f"{seed}-{identity}")) if variant else image
            changed.save(output / picture.path)
            training.append(picture)
    return training, heldout


def render(pixels: np.ndarray, size: int) -> Image.Image:
    """Render a digit in black on white, RGB, [size, size], from ink in [0, 16], [8, 8]."""
    grey = np.round(255 - pixels * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def vary(image: Image.Image, draw: random.Random) -> Image.Image:
    """Rotate by up to 10 degrees, scale by up to 10%, shift by up to a sixteenth of the width."""
    angle = math.radians(draw.uniform(-10, 10))
    scale = draw.uniform(0.9, 1.1)
    size, shift = image.width, image.width / 16
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre = size / 2
    x = centre + draw.uniform(-shift, shift)
    y = centre + draw.uniform(-shift, shift)
    inverse = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor="white"
    )


# Documents


def document(identity: str, source: str, *content: str | Picture, **extra: Any) -> dict[str, Any]:
    """A document of texts and pictures in the given order."""
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part.path}
        for part in content
    ]
    return {"id": identity, "source": source, **extra, "content": parts}


def pairs(
    pictures: Iterable[Picture], templates: tuple[str, ...], source: str, draw: random.Random
) -> Iterator[dict[str, Any]]:
    """Documents of a picture and its caption; each of the two comes first in half of them."""
    for picture in pictures:
        content: list[str | Picture] = [fill(draw.choice(templates), picture.label), picture]
        if draw.random() < 0.5:
            content.reverse()
        yield document(f"{source}-{picture.id}", source, *content, label=picture.label)


def sums(pictures: list[Picture], count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Documents of a sum, with pictures of its digits and the result in words."""
    for number in range(count):
        left, right = draw.choice(pictures), draw.choice(pictures)
        total = left.label + right.label
        content: list[str | Picture] = []
        text = draw.choice(SUMS).format(left="\0L\0", right="\0R\0", total=WORDS[total])
        for piece in text.split("\0"):
            if piece:
                content.append({"L": left, "R": right}.get(piece, piece))
        labels = [left.label, right.label, total]
        yield document(f"sums-{number:05d}", "sums", *content, labels=labels)


def texts(count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Documents of one to four sentences about numbers, without pictures."""
    kinds = (counting, arithmetic, comparison, spelling, shape)
    for number in range(count):
        sentences = [draw.choice(kinds)(draw) for _ in range(draw.randint(1, 4))]
        yield document(f"text-{number:05d}", "text", " ".join(sentences))


def counting(draw: random.Random) -> str:
    start = draw.randint(0, 6)
    words = WORDS[start : start + draw.randint(3, 9)]
    if draw.random() < 0.3:
        return f"Counting down: {', '.join(reversed(words))}."
    return f"Counting up from {words[0]}: {', '.join(words)}."


def arithmetic(draw: random.Random) -> str:
    a, b = draw.randint(0, 9), draw.randint(0, 9)
    if draw.random() < 0.3:
        high, low = max(a, b), min(a, b)
        return f"{WORDS[high].capitalize()} minus {WORDS[low]} is {WORDS[high - low]}."
    if draw.random() < 0.4:
        return f"{a} + {b} = {a + b}."
    return f"{WORDS[a].capitalize()} plus {WORDS[b]} is {WORDS[a + b]}."


def comparison(draw: random.Random) -> str:
    low, high = sorted(draw.sample(range(10), 2))
    if draw.random() < 0.5:
        return f"{WORDS[high].capitalize()} is greater than {WORDS[low]}."
    return f"{WORDS[low].capitalize()} is less than {WORDS[high]}."


def spelling(draw: random.Random) -> str:
    number = draw.randint(0, 18)
    return f"The numeral {number} is spelled {WORDS[number]}."


def shape(draw: random.Random) -> str:
    digit = draw.randint(0, 9)
    return f"A handwritten {WORDS[digit]} {SHAPES[digit]}."


def chats(
    training: list[Picture], clean: list[Picture], count: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    """Conversations: the user shows any picture, the model draws unchanged digits."""
    for number, messages in enumerate(Chats(training, clean, draw).conversations(count)):
        yield {"id": f"chats-{number:05d}", "source": "chats", "messages": messages}


# Files


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write a text file completely or not at all, and return the number of its lines."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
            count += 1
    partial.replace(path)
    return count


def write_documents(output: Path, args: argparse.Namespace) -> None:
    training, heldout = write_pictures(output, args.variants, args.size, args.seed)
    print(f"{output}/train_images: {len(training)} pictures of {args.size} x {args.size} pixels")
    print(f"{output}/heldout_images: {len(heldout)} pictures")
    clean = [picture for picture in training if picture.variant == 0]
    draws = {
        name: random.Random(f"{args.seed}-{name}")
        for name in ("pairs", "sums", "text", "q", "chats")
    }
    files = {
        "pairs": list(pairs(training, CAPTIONS, "pairs", draws["pairs"])),
        "sums": list(sums(training, args.sums, draws["sums"])),
        "text": list(texts(args.texts, draws["text"])),
        "chats": list(chats(training, clean, args.chats, draws["chats"])),
        "quality": list(pairs(clean, CANONICAL, "quality", draws["q"])),
        # The picture always comes first, with the first phrasing, so that all are scored alike.
        "heldout": [
            document(p.id, "heldout", p, fill(CANONICAL[0], p.label), label=p.label)
            for p in heldout
        ],
    }
    for name, documents in files.items():
        path = output / f"{name}.jsonl"
        print(f"{path}: {write_lines(path, map(json.dumps, documents))} documents")
    corpus = (
        part["text"]
        for name, documents in files.items()
        if name != "heldout"
        for record in documents
        for message in record.get("messages", [record])
        for part in message["content"]
        if part["type"] == "text"
    )
    path = output / "corpus.txt"
    print(f"{path}: {write_lines(path, corpus)} lines, for the text tokenizer")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the documents of the digits demo.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--variants", type=int, default=8, help="pictures per training digit")
    parser.add_argument("--size", type=int, default=16, help="width and height in pixels")
    parser.add_argument("--sums", type=int, default=4000, help="number of documents in sums.jsonl")
    parser.add_argument("--texts", type=int, default=4000, help="number of documents in text.jsonl")
    parser.add_argument(
        "--chats", type=int, default=16000, help="number of conversations in chats.jsonl"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of everything except the held-out split"
    )
    args = parser.parse_args(argv)
    if min(args.variants, args.sums, args.texts, args.chats) < 1 or args.size < 8:
        counts = "--variants, --sums, --texts and --chats"
        parser.error(f"{counts} must be at least 1, and --size at least 8")
    write_documents(args.output, args)


if __name__ == "__main__":
    main()
