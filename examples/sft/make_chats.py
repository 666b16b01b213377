r"""Make conversations about handwritten digits, for fine-tuning the model of the digits demo.

    PYTHONPATH=examples/digits python examples/sft/make_chats.py \
        --pictures runs/digits/data --output runs/sft/data

The script reads the pictures that the demo made. It writes three kinds of conversations, and
questions about held-out digits that are in no training file:

- questions.jsonl: a picture and a question that asks for an answer in a word or in a numeral
- drawings.jsonl: a request in words that is answered by a picture
- dialogues.jsonl: a question about a picture, then a request for another digit
- heldout.jsonl: questions without answers; ``label`` and ``form`` determine the right answer
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chats import WORDS, Part, fill, image, text

ASK = {
    "word": ("What digit is this? Answer in a word.", "Read this number in a word."),
    "numeral": ("What digit is this? Answer in a numeral.", "Read this number in a numeral."),
}
DRAW = ("Draw {a} {word}.", "Draw the digit {word}.", "A picture of {a} {word}, written by hand.")


def answer(label: int, form: str) -> str:
    """The exact right answer."""
    return WORDS[label] if form == "word" else str(label)


def ask(path: str, form: str, draw: random.Random) -> list[Part]:
    return [image(path), text(draw.choice(ASK[form]))]


def questions(pictures: list[tuple[str, int]], draw: random.Random) -> Iterator[dict[str, Any]]:
    for path, label in pictures:
        form = draw.choice(tuple(ASK))
        yield {"prompt": ask(path, form, draw), "answer": answer(label, form)}


def drawings(pictures: list[tuple[str, int]], draw: random.Random) -> Iterator[dict[str, Any]]:
    for path, label in pictures:
        yield {"prompt": fill(draw.choice(DRAW), label), "answer": [image(path)]}


def dialogues(
    pictures: list[tuple[str, int]], count: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        (first, label), (second, wanted) = draw.choice(pictures), draw.choice(pictures)
        form = draw.choice(tuple(ASK))
        turns = (
            ("user", ask(first, form, draw)),
            ("assistant", answer(label, form)),
            ("user", fill(draw.choice(DRAW), wanted)),
            ("assistant", [image(second)]),
        )
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def heldout(pictures: list[tuple[str, int]], draw: random.Random) -> Iterator[dict[str, Any]]:
    for number, (path, label) in enumerate(pictures):
        form = tuple(ASK)[number % len(ASK)]
        yield {"prompt": ask(path, form, draw), "label": label, "form": form}


def read_pictures(file: Path, output: Path) -> list[tuple[str, int]]:
    """Read the paths (relative to ``output``) and labels of the pictures in a file of pairs."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = next(part["image"] for part in record["content"] if part["type"] == "image")
        found.append((os.path.relpath(file.parent / name, output), record["label"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make conversations about handwritten digits.")
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="the data folder of the demo"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--count", type=int, default=4000, help="number of conversations of each kind"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    pictures = read_pictures(args.pictures / "pairs.jsonl", args.output)
    draw.shuffle(pictures)
    count = min(args.count, len(pictures))
    files = {
        "questions": questions(pictures[:count], draw),
        "drawings": drawings(pictures[-count:], draw),
        "dialogues": dialogues(pictures, count, draw),
        "heldout": heldout(read_pictures(args.pictures / "heldout.jsonl", args.output), draw),
    }
    for name, records in files.items():
        path = args.output / f"{name}.jsonl"
        lines = [json.dumps({"source": name, **record}) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
