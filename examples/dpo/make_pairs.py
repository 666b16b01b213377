r"""Let the digits model draw, let the demo's judge read the drawings, and write pairs of drawings.

    PYTHONPATH=examples/digits:examples/sft python examples/dpo/make_pairs.py runs/digits/exported \
        --pictures runs/digits/data --output runs/dpo/data

Of each pair in pairs.jsonl, the chosen answer is a drawing of the model in which the judge reads
the digit that was asked for, and the rejected one is a drawing of another digit for the same
request. Where the model has no right drawing, a real picture is chosen; where it has too few wrong
ones, right drawings of other digits are rejected.
"""

import argparse
import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from chats import fill, image
from make_chats import DRAW, read_pictures
from measure import ask
from PIL import Image
from report import CLASSES, Judge

from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session


@dataclass(frozen=True)
class Drawing:
    """A drawing of the model."""

    request: str
    wanted: int
    read: int
    """The digit that the judge sees."""
    path: str
    """Relative to the output folder."""


def draw_and_judge(session: Session, count: int, output: Path, seed: int) -> list[Drawing]:
    """Ask for drawings of all digits in turn. Answers that are not one image are left out."""
    asked = [(fill(DRAW[i // CLASSES % len(DRAW)], i % CLASSES), i % CLASSES) for i in range(count)]
    documents = [Document("", "", (TextPart(text),), "request") for text, _ in asked]
    options = GenerationOptions(
        seed=seed, repetition_penalty=1.0, max_tokens=40, batch_size=min(100, count)
    )
    contents = [answer.content for answer in ask(session, documents, options)]
    drawn = [
        (content[0], *request)
        for content, request in zip(contents, asked, strict=True)
        if len(content) == 1 and isinstance(content[0], Image.Image)
    ]
    judged = Judge().classify([picture for picture, _, _ in drawn]) if drawn else []
    (output / "drawings").mkdir(exist_ok=True)
    found = []
    for number, ((picture, text, wanted), read) in enumerate(zip(drawn, judged, strict=True)):
        path = f"drawings/{number:05d}.png"
        picture.save(output / path)
        found.append(Drawing(text, wanted, read, path))
    return found


def make_pairs(
    drawings: list[Drawing], pictures: list[tuple[str, int]], least: int, draw: random.Random
) -> list[dict[str, object]]:
    """Pairs for all wrong drawings, and at least ``least``."""
    right, real = defaultdict(list), defaultdict(list)
    for drawing in drawings:
        if drawing.read == drawing.wanted:
            right[drawing.wanted].append(drawing.path)
    for path, label in pictures:
        real[label].append(path)
    rejected = [(d.request, d.wanted, d.path) for d in drawings if d.read != d.wanted]
    while len(rejected) < least:
        wanted, other = draw.sample(range(CLASSES), 2)
        bad = draw.choice(right[other] or real[other])
        rejected.append((fill(draw.choice(DRAW), wanted), wanted, bad))
    return [
        {
            "prompt": request,
            "chosen": [image(draw.choice(right[wanted] or real[wanted]))],
            "rejected": [image(bad)],
        }
        for request, wanted, bad in rejected
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make pairs of drawings of handwritten digits.")
    parser.add_argument("model", help="a checkpoint, run folder or exported folder")
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="the data folder of the demo"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--requests", type=int, default=1500, help="number of drawings to ask for")
    parser.add_argument("--least", type=int, default=240, help="least number of pairs")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    # measure.py draws with seeds of its own
    drawings = draw_and_judge(
        Session.load(args.model), args.requests, args.output, 1000 + args.seed
    )
    pictures = read_pictures(args.pictures / "pairs.jsonl", args.output)
    records = make_pairs(drawings, pictures, args.least, draw)
    draw.shuffle(records)
    lines = [json.dumps(record) + "\n" for record in records]
    partial = args.output / f".pairs.jsonl.{os.getpid()}"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(args.output / "pairs.jsonl")
    wrong = sum(drawing.read != drawing.wanted for drawing in drawings)
    print(
        f"{args.output / 'pairs.jsonl'}: {len(records)} pairs; of {args.requests} requests, "
        f"{len(drawings)} were answered with one drawing, {wrong} of them of another digit"
    )


if __name__ == "__main__":
    main()
