r"""Ask a model held-out questions and ask it for drawings, and count the right answers.

    PYTHONPATH=examples/digits python examples/sft/measure.py runs/sft/exported \
        --data runs/sft/data --pictures runs/digits/data

Every question is asked as a conversation, at temperature 0. The model itself chooses whether to
answer with text or with an image. The judge of drawings is the demo's SVM, which never saw the
model.
"""

import argparse
import json
from pathlib import Path

from chats import WORDS, fill
from make_chats import DRAW, answer
from PIL import Image
from report import CLASSES, Judge

from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.inference.chat import chat_prompt
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Answer, Session

FORMS = {"word": set(WORDS[:CLASSES]), "numeral": set(map(str, range(CLASSES)))}


def ask(session: Session, documents: list[Document], options: GenerationOptions) -> list[Answer]:
    return session.generate([chat_prompt(d, session.tokenizer) for d in documents], options)


def said(found: Answer) -> str | None:
    """The text of an answer that consists of text alone; otherwise None."""
    content = found.content
    return content[0].strip() if len(content) == 1 and isinstance(content[0], str) else None


def measure_questions(
    session: Session, file: Path, count: int, images: ImageOptions
) -> dict[str, float]:
    """Shares of held-out questions that are answered in the requested form, and exactly right."""
    lines = file.read_bytes().splitlines()[:count]
    records = [json.loads(line) for line in lines]
    documents = [parse_line(line, file, n, images) for n, line in enumerate(lines, start=1)]
    options = GenerationOptions(temperature=0, repetition_penalty=1.0, max_tokens=40)
    texts = [said(found) for found in ask(session, documents, options)]
    pairs = list(zip(texts, records, strict=True))
    form = sum(text in FORMS[record["form"]] for text, record in pairs)
    right = sum(text == answer(record["label"], record["form"]) for text, record in pairs)
    return {"requested form": form / len(pairs), "exactly right": right / len(pairs)}


def measure_drawings(session: Session, each: int, seed: int) -> dict[str, float]:
    """Shares of requests that are answered by an image alone, and by one of the right digit."""
    labels = [digit for digit in range(CLASSES) for _ in range(each)]
    texts = [fill(DRAW[i % len(DRAW)], label) for i, label in enumerate(labels)]
    documents = [Document("", "", (TextPart(text),), "request") for text in texts]
    options = GenerationOptions(seed=seed, repetition_penalty=1.0, max_tokens=40)
    found = ask(session, documents, options)
    contents = [answer.content for answer in found]
    drawn = [(c[0], n) for c, n in zip(contents, labels, strict=True) if len(c) == 1]
    images = [(image, label) for image, label in drawn if isinstance(image, Image.Image)]
    judged = Judge().classify([image for image, _ in images]) if images else []
    right = sum(seen == label for seen, (_, label) in zip(judged, images, strict=True))
    return {"an image": len(images) / len(labels), "the requested digit": right / len(labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a fine-tuned digits model.")
    parser.add_argument("model", help="a checkpoint, run folder or exported folder")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the output folder of make_chats.py"
    )
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="the data folder of the demo"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the figures to this JSON file"
    )
    parser.add_argument("--questions", type=int, default=200, help="number of questions to ask")
    parser.add_argument("--drawings", type=int, default=10, help="drawings per digit")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    session = Session.load(args.model)
    images = ImageOptions(roots=(str(args.pictures),))
    figures = {
        "questions": measure_questions(
            session, args.data / "heldout.jsonl", args.questions, images
        ),
        "drawings": measure_drawings(session, args.drawings, args.seed),
    }
    for kind, values in figures.items():
        print(
            f"{kind}: {', '.join(f'{name} {100 * value:.1f}%' for name, value in values.items())}"
        )
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
