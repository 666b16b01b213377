r"""Let the digits model draw, let the demo's judge read the drawings, and write pairs of drawings.

    PYTHONPATH=examples/digits:examples/sft python examples/dpo/make_pairs.py runs/digits/exported \
        --output runs/dpo/data

The model answers each request several times, at temperature 1. An answer is right if it has one
picture, and the judge reads the digit in it that was asked for. Each wrong answer becomes the
rejected one of a pair in pairs.jsonl. The chosen one is a right answer to the same request, or, if
there is none, to another request for the same digit. No request is one of those that compare.py
uses.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chat_figures
from chats import Part, fill, image, text, wish
from measure import ask
from PIL import Image
from report import CLASSES, Judge

from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Answer, Session


@dataclass(frozen=True)
class Drawn:
    """An answer to a request for a drawing."""

    request: str
    wanted: int
    parts: list[Part]
    """Its texts and pictures, as in a record."""
    is_right: bool


def make_requests(count: int, draw: random.Random) -> list[tuple[str, int]]:
    """Different requests as users may type them, with the digits in turn."""
    kept_out = {
        fill(form, digit).lower()
        for form in (*chat_figures.DRAW, *chat_figures.THEN_DRAW)
        for digit in range(CLASSES)
    }
    found: dict[str, int] = {}
    while len(found) < count:
        digit = len(found) % CLASSES
        words = wish(digit, draw)
        if words.lower() not in kept_out:
            found.setdefault(words, digit)
    return list(found.items())


def judge_answers(
    answers: Sequence[Answer], requests: Sequence[tuple[str, int]], output: Path
) -> list[Drawn]:
    """Write the pictures of answers, and let the judge read them. Empty answers are left out."""
    judge, found = Judge(), []
    (output / "drawings").mkdir(exist_ok=True)
    for number, (answer, (words, wanted)) in enumerate(zip(answers, requests, strict=True)):
        parts, pictures = [], []
        for place, part in enumerate(answer.content):
            if isinstance(part, Image.Image):
                path = f"drawings/{number:05d}-{place}.png"
                part.save(output / path)
                pictures.append(part)
                parts.append(image(path))
            else:
                parts.append(text(part))
        is_right = len(pictures) == 1 and judge.classify(pictures) == [wanted]
        if parts:
            found.append(Drawn(words, wanted, parts, is_right))
    return found


def make_pairs(answers: Sequence[Drawn], draw: random.Random) -> list[dict[str, Any]]:
    """One pair for each wrong answer."""
    right = [answer for answer in answers if answer.is_right]
    found = []
    for wrong in (answer for answer in answers if not answer.is_right):
        same = [answer for answer in right if answer.request == wrong.request]
        better = same or [answer for answer in right if answer.wanted == wrong.wanted]
        if better:
            chosen = draw.choice(better).parts
            found.append({"prompt": wrong.request, "chosen": chosen, "rejected": wrong.parts})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make pairs of drawings of handwritten digits.")
    parser.add_argument("model", help="a checkpoint, run folder or exported folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--requests", type=int, default=1000, help="number of different requests")
    parser.add_argument("--answers", type=int, default=4, help="answers to each request")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    requests = make_requests(args.requests, draw) * args.answers
    documents = [Document("", "", (TextPart(words),), "request") for words, _ in requests]
    options = GenerationOptions(
        temperature=1.0, top_p=1.0, repetition_penalty=1.0, max_tokens=48, seed=1000 + args.seed
    )  # compare.py has other seeds
    answers = ask(Session.load(args.model), documents, options)
    judged = judge_answers(answers, requests, args.output)
    records = make_pairs(judged, draw)
    if not records:
        sys.exit("error: no answer was wrong, or none was right: ask for more with --requests")
    draw.shuffle(records)
    file = args.output / "pairs.jsonl"
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(file)
    right = sum(answer.is_right for answer in judged)
    print(f"{file}: {len(records)} pairs; {right} of {len(requests)} answers were right")


if __name__ == "__main__":
    main()
