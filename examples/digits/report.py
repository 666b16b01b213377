"""Measure the trained digits model and write its report: numbers, a page and a picture.

    python examples/digits/report.py runs/digits

The script reads RUN/exported (or RUN's newest checkpoint), RUN/data/heldout.jsonl and
RUN/metrics.jsonl. It writes RUN/report.json, RUN/report/index.html and RUN/report/overview.png. The
judge of generated images is a support vector machine (SVM) that was fitted on the real training
digits and never saw the model.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from chat_figures import measure_chats
from chat_page import chat_sections
from chats import fill
from make_documents import CANONICAL, HELD_OUT_SHARE, SPLIT_SEED
from PIL import Image
from report_page import write_overview, write_page
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.evaluation.curves import read_whole_metrics, series
from megatron_chameleon.evaluation.tasks.captions import accuracy, confusion, first_digit
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import CAPTION_OPTIONS, Session
from megatron_chameleon.masking import masked_command
from megatron_chameleon.pages.page import Origin
from megatron_chameleon.runs.metrics import Metrics

CLASSES = 10
LAST_STEPS = 20
"""The final loss is the mean over this number of last steps."""


@dataclass(frozen=True)
class Captions:
    """Held-out images, the digits that they show, and the model's captions."""

    images: list[Image.Image]
    labels: list[int]
    texts: list[str]
    digits: list[int | None]


@dataclass(frozen=True)
class Drawings:
    """Generated images, the digits that were asked for, and those that the judge sees."""

    images: list[Image.Image]
    labels: list[int]
    judged: list[int]


class Judge:
    """Classifies digits with an RBF-SVM on 8x8 pixels, scikit-learn's setting for this data set."""

    def __init__(self) -> None:
        digits = load_digits()
        order = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
        train = order[round(HELD_OUT_SHARE * len(order)) :]
        self._svm = SVC(kernel="rbf", gamma=0.001).fit(digits.data[train], digits.target[train])

    def classify(self, images: Sequence[Image.Image]) -> list[int]:
        """Classify images of any size, with black ink on white."""
        return [int(digit) for digit in self._svm.predict(np.stack([to_8x8(i) for i in images]))]


def to_8x8(image: Image.Image) -> np.ndarray:
    """Convert an image to 64 amounts of ink in [0, 16], each the mean of a box, like the data."""
    small = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    return 16 - np.asarray(small, dtype=np.float64).ravel() * (16 / 255)


def read_heldout(file: Path) -> tuple[list[Image.Image], list[int]]:
    """Read the images and labels of the held-out digits.

    Raises:
        DataError: The file is missing, or a line has no image or no label.
    """
    images, labels = [], []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        remedy = "Run examples/digits/make_documents.py first"
        raise DataError(str(file), f"cannot be read ({error.strerror})", remedy) from error
    for number, line in enumerate(lines, start=1):
        record = json.loads(line)
        try:
            image = next(part["image"] for part in record["content"] if part["type"] == "image")
            labels.append(int(record["label"]))
        except (KeyError, StopIteration) as error:
            remedy = "Run examples/digits/make_documents.py again"
            raise DataError(f"{file}:{number}", "no image or no label", remedy) from error
        images.append(Image.open(file.parent / image).convert("RGB"))
    return images, labels


def caption_heldout(session: Session, images: list[Image.Image], labels: list[int]) -> Captions:
    """Caption every held-out image, always with the most likely token."""
    texts = session.caption(images, options=CAPTION_OPTIONS)
    return Captions(images, labels, texts, [first_digit(text) for text in texts])


def draw_digits(session: Session, judge: Judge, each: int, options: GenerationOptions) -> Drawings:
    """Draw every digit ``each`` times from its text, and classify the drawings with the judge."""
    labels = [digit for digit in range(CLASSES) for _ in range(each)]
    prompts = [fill(CANONICAL[i % len(CANONICAL)], digit) for i, digit in enumerate(labels)]
    images = session.draw(prompts, options)
    return Drawings(images, labels, judge.classify(images))


def reconstruct(session: Session, images: list[Image.Image]) -> list[Image.Image]:
    """Encode images with the image tokenizer and decode them again."""
    tokenizer = session.tokenizer.image
    assert tokenizer is not None
    return tokenizer.decode(tokenizer.encode(images))


def psnr_db(images: Sequence[Image.Image], again: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio over all pixels, in decibels; the peak is 255."""
    pairs = zip(images, again, strict=True)
    differences = [
        np.asarray(a.resize(b.size, Image.Resampling.LANCZOS), float) - np.asarray(b, float)
        for a, b in pairs
    ]
    mean_square = float(np.mean(np.square(differences)))
    return float(10 * np.log10(255**2 / mean_square)) if mean_square else float("inf")


def training_numbers(records: Metrics) -> dict[str, Any]:
    """Steps, time, speed and final losses from the metrics of a run."""

    def values(key: str) -> np.ndarray:
        return series(records, key)[1]

    def last(key: str) -> float | None:
        tail = values(key)[-LAST_STEPS:]
        return float(tail.mean()) if len(tail) else None

    speeds = values("tokens_per_second")
    return {
        "steps": records.last_step,
        "train_seconds": float(values("step_seconds").sum()),
        "tokens_per_second": float(np.median(speeds)) if len(speeds) else None,
        "final_loss_text": last("loss_text"),
        "final_loss_image": last("loss_image"),
    }


def measure(run: Path, each: int, options: GenerationOptions) -> dict[str, Any]:
    """Measure a run, write its page and picture, and return the numbers."""
    started = time.monotonic()
    records = read_whole_metrics(run)
    exported = run / "exported"
    session = Session.load(exported if exported.is_dir() else run)
    images, labels = read_heldout(run / "data" / "heldout.jsonl")
    judge = Judge()
    _say("captions", started)
    captions = caption_heldout(session, images, labels)
    _say("drawings", started)
    drawings = draw_digits(session, judge, each, options)
    _say("conversations", started)
    chats = measure_chats(session, judge, (images, labels), options)
    _say("reconstructions", started)
    again = reconstruct(session, images)
    numbers = {
        "caption_accuracy": accuracy(captions.digits, labels),
        "generated_image_accuracy": accuracy(drawings.judged, drawings.labels),
        "reconstruction_psnr_db": psnr_db(images, again),
        **chats.numbers(),
        **training_numbers(records),
        "heldout_images": len(images),
        "generated_images": len(drawings.images),
        "judge_accuracy_on_real_images": accuracy(judge.classify(images), labels),
        "judge_accuracy_on_reconstructions": accuracy(judge.classify(again), labels),
        "captions_without_a_digit": captions.digits.count(None),
        "model_step": session.step,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    tables = {
        "captions": confusion(captions.digits, labels, CLASSES),
        "drawings": confusion(drawings.judged, drawings.labels, CLASSES),
    }
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    _say("pictures", started)
    write_overview(folder / "overview.png", records, numbers, tables, captions, drawings, again)
    config = (run / "config.yaml").read_text(encoding="utf-8")
    page = folder / "index.html"
    talks = chat_sections(chats)
    command = masked_command(sys.argv)
    origin = Origin(command, datetime.now(UTC), run.resolve().name, options.seed)
    write_page(page, records, numbers, tables, captions, drawings, again, talks, config, origin)
    numbers["report_seconds"] = time.monotonic() - started
    return numbers


def _say(what: str, started: float) -> None:
    print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure the trained digits model.")
    parser.add_argument("run", type=Path, help="the run folder, for example runs/digits")
    parser.add_argument("--each", type=int, default=10, help="drawings per digit (default: 10)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="temperature for drawings (default: 0.7)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="top-p for drawings (default: 0.9)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    options = GenerationOptions(
        temperature=args.temperature, top_p=args.top_p, seed=args.seed, batch_size=100
    )
    try:
        numbers = measure(args.run, args.each, options)
    except ChameleonError as error:
        sys.exit("\n".join(f"error: {line}" for line in error.lines()))
    partial = args.run / f".report.json.{os.getpid()}"
    partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    partial.replace(args.run / "report.json")
    for name, value in numbers.items():
        print(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")


if __name__ == "__main__":
    main()
