"""``chameleon tokenizer text|image``: train the two tokenizers of a tokenizer folder.

    chameleon tokenizer text corpus.txt --output DIR --vocab-size 65536 --image-codes 8192
    chameleon tokenizer image photos/ --output DIR --config chameleon_512 training.steps=1000

Both write into the same folder, in either order.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    IDS,
    SEED,
    add_action,
    add_common_options,
    add_image_options,
    image_options,
)
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments

_logger = logging.getLogger(__name__)


DROPPED_TEXTS, DROPPED_DOCUMENTS = "text.dropped.jsonl", "image.dropped_documents.jsonl"
"""Lists of the documents that were left out. ``image.dropped.jsonl`` has the unreadable images."""
WRITTEN = {
    "text": ("text.model", "vocabulary.json", DROPPED_TEXTS),
    "image": ("image.safetensors", "image.json", "image.dropped.jsonl", DROPPED_DOCUMENTS),
}
"""The files of the tokenizer folder that each kind replaces."""


def is_override(word: str) -> bool:
    """Whether a word is ``key=value``, and neither an option nor the name of a file."""
    return "=" in word and not word.startswith("-") and not Path(word).exists()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    text = add_action(
        kinds, "text", "train a sentencepiece BPE, which defines the vocabulary of the model"
    )
    text.add_argument(
        "files", nargs="+", metavar="FILE", help="documents, as for preprocess, or .txt files"
    )
    text.add_argument("--output", required=True, metavar="DIR", help="the tokenizer folder")
    text.add_argument(
        "--vocab-size",
        required=True,
        type=IDS,
        metavar="N",
        help="number of token ids, including image codes and special tokens",
    )
    text.add_argument(
        "--image-codes",
        required=True,
        type=IDS,
        metavar="N",
        help="codebook size of the image tokenizer",
    )
    image = add_action(kinds, "image", "train a VQGAN, which turns images into codes")
    image.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders, or documents, as for preprocess (their key `weight` says how "
        "often an image is drawn)",
    )
    image.add_argument("--output", required=True, metavar="DIR", help="the tokenizer folder")
    image.add_argument(
        "--config",
        default="chameleon_512",
        metavar="NAME|YAML",
        help="a preset (chameleon_512, digits) or a YAML file; section.key=value replaces values",
    )
    image.add_argument(
        "--seed", type=SEED, default=1, metavar="N", help="seed of the training (default: 1)"
    )
    image.add_argument(
        "--restart",
        action="store_true",
        help="start from the beginning and discard an unfinished training of DIR; without it, the "
        "same command goes on after a kill",
    )
    add_image_options(image)
    image.set_defaults(overrides=[])
    for kind in (text, image):
        add_common_options(kind, nested=True)


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.outputs import check_name, keep_inputs

    folder = check_name("--output", args.output)
    inputs = args.files if args.kind == "text" else args.images
    keep_inputs("--output", [folder / name for name in WRITTEN[args.kind]], inputs)
    if args.kind == "text":
        _train_text(args)
    else:
        _train_image(args)


def _train_text(args: argparse.Namespace) -> None:
    from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
    from megatron_chameleon.data.tokenizer_corpus.texts import read_texts
    from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

    start_seconds = time.perf_counter()
    dropped = DroppedDocuments()
    try:
        with announced(f"reading {counted(len(args.files), 'file')} and training on their text"):
            vocabulary = train_text_tokenizer(
                read_texts(args.files, dropped), args.output, args.vocab_size, args.image_codes
            )
    finally:
        _report(dropped)
    dropped.write(Path(args.output) / DROPPED_TEXTS)
    seconds = time.perf_counter() - start_seconds
    show(
        f"{args.output}: text tokenizer with {vocabulary.size} ids, "
        f"{vocabulary.image_codes} of them image codes, in {seconds:.1f} s"
    )


def _train_image(args: argparse.Namespace) -> None:
    from megatron_chameleon.tokenizer.image.config import load_image_config

    start_seconds = time.perf_counter()
    words = [word for word in args.images if is_override(word)]
    config = load_image_config(args.config, [*words, *args.overrides])

    from megatron_chameleon.cli.stopping import StopRequests
    from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
    from megatron_chameleon.data.tokenizer_corpus.images import find_images
    from megatron_chameleon.parallel import platform
    from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer

    dropped = DroppedDocuments()
    try:
        with announced(f"listing the images of {counted(len(args.images) - len(words), 'path')}"):
            paths = [image for image in args.images if image not in words]
            images = find_images(paths, image_options(args), dropped)
    finally:
        _report(dropped)
    stop = StopRequests()
    result = train_image_tokenizer(
        images,
        config,
        args.output,
        seed=args.seed,
        device=platform.device(),
        report=_logger.info,
        stop=stop,
        restart=args.restart,
    )
    if result is None:
        sys.exit(stop.exit_code())
    dropped.write(Path(args.output) / DROPPED_DOCUMENTS)
    show(
        f"{args.output}: image tokenizer from {counted(result.images, 'image')} "
        f"({result.dropped} dropped), "
        f"{result.psnr:.1f} dB, {result.codes_used} of {result.codebook_size} codes used, "
        f"in {time.perf_counter() - start_seconds:.1f} s"
    )


def _report(dropped: "DroppedDocuments") -> None:
    dropped.unused_keys.report()
    if summary := dropped.summary():
        _logger.warning("%s", summary)
