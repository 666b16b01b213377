r"""Measure models before and after preference tuning: what it should improve, and what it may harm.

    PYTHONPATH=examples/digits:examples/sft python examples/dpo/compare.py \
        runs/digits/exported runs/dpo/exported --pictures runs/digits/data

The requests are phrasings that make_pairs.py leaves out. The model itself chooses whether it writes
or draws.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from chat_figures import DRAW, measure_chats
from chats import fill
from measure import ask
from PIL import Image
from report import CLASSES, Judge, caption_heldout, read_heldout

from megatron_chameleon.checkpoint.loading.transformers_model import logits
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.evaluation.tasks.captions import accuracy
from megatron_chameleon.inference.chat import chat_prompt
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Answer, Session

Heldout = tuple[list[Image.Image], list[int]]


def measure_drawings(
    session: Session, judge: Judge, count: int, options: GenerationOptions
) -> dict[str, float]:
    """Ask ``count`` times for a drawing. All figures are shares of the requests."""
    labels = [number % CLASSES for number in range(count)]
    words = [fill(DRAW[n // CLASSES % len(DRAW)], label) for n, label in enumerate(labels)]
    documents = [Document("", "", (TextPart(each),), "request") for each in words]
    answers = ask(session, documents, options)
    pictures = [[p for p in a.content if isinstance(p, Image.Image)] for a in answers]
    found = zip(pictures, labels, strict=True)
    ones = [(these[0], label) for these, label in found if len(these) == 1]
    judged = judge.classify([picture for picture, _ in ones]) if ones else []
    right = sum(seen == label for seen, (_, label) in zip(judged, ones, strict=True))
    different = {(label, picture.tobytes()) for picture, label in ones}
    exact = [has_exact_length(session, d, a) for d, a in zip(documents, answers, strict=True)]
    return {
        "right": right / count,
        "one image": len(ones) / count,
        "different": len(different) / count,
        "exact length": sum(exact) / count,
    }


def has_exact_length(session: Session, document: Document, answer: Answer) -> bool:
    """Whether the model itself would have ended the one image of an answer where it must end.

    Generation allows nothing but codes until an image is full. This looks at the most likely token
    among all, at each code and at the end.
    """
    vocabulary = session.tokenizer.vocabulary
    if answer.token_ids.count(vocabulary.begin_image) != 1:
        return False
    prompt = session.encode([chat_prompt(document, session.tokenizer)])[0]
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    first = len(prompt) + answer.token_ids.index(vocabulary.begin_image)
    length = session.codes_per_image
    likely = logits(session.model, ids)[0, first : first + length + 1].argmax(-1).tolist()
    codes = set(vocabulary.code_token_ids.tolist())
    return codes.issuperset(likely[:length]) and likely[length] == vocabulary.end_image


def measure(session: Session, heldout: Heldout, drawings: int, seed: int) -> dict[str, float]:
    """All figures of a model, as shares."""
    judge = Judge()
    options = GenerationOptions(repetition_penalty=1.0, max_tokens=48, seed=seed)
    found = measure_drawings(session, judge, drawings, options)
    found["captions"] = accuracy(caption_heldout(session, *heldout).digits, heldout[1])
    chats = measure_chats(session, judge, heldout, options)
    found["second drawing"] = chats.second_drawings.right
    found["reading"] = chats.readings.right
    found["recall"] = chats.recalled.right
    found["sums"] = chats.sums.right
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare models before and after tuning.")
    parser.add_argument("models", nargs="+", help="checkpoints, run folders or exported folders")
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="the data folder of the demo"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the figures to this JSON file"
    )
    parser.add_argument("--drawings", type=int, default=1000, help="number of requests")
    parser.add_argument("--captions", type=int, help="number of held-out pictures (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    images, labels = read_heldout(args.pictures / "heldout.jsonl")
    heldout = images[: args.captions], labels[: args.captions]
    sessions = {model: Session.load(model) for model in args.models}
    figures = {}
    for model, session in sessions.items():
        figures[model] = found = measure(session, heldout, args.drawings, args.seed)
        shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in found.items())
        print(f"{model}: {shares}", flush=True)
    worst = max(found["right"] * (1 - found["right"]) for found in figures.values())
    error = 100 * (worst / args.drawings) ** 0.5
    print(f"{args.drawings} drawings; sampling error of their figures up to {error:.1f} points")
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
