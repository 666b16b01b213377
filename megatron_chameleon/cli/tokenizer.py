"""``chameleon tokenizer text|image``: train the two tokenizers of a tokenizer folder.

    chameleon tokenizer text corpus.txt --output DIR --vocab-size 65536 --image-codes 8192
    chameleon tokenizer image photos/ --output DIR --config chameleon_512 training.steps=1000

Both write into the same folder, in either order.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    IDS,
    IMAGE_BUDGET,
    PIXELS,
    RATIO,
    SEED,
    add_action,
    add_common_options,
    add_image_options,
    image_options,
)
from megatron_chameleon.cli.ranks import one_of_a_job
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.masking import masked_command
from megatron_chameleon.tokenizer.common.grids import LARGEST_RATIO, Shapes
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
    from megatron_chameleon.parallel.launch import Launch
    from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

_logger = logging.getLogger(__name__)


DROPPED_TEXTS, DROPPED_DOCUMENTS = "text.dropped.jsonl", "image.dropped_documents.jsonl"
"""Lists of the documents that were left out. ``image.dropped.jsonl`` has the unreadable images."""
RUN_FOLDER = "image.run"
WRITTEN = {
    "text": ("text.model", "vocabulary.json", DROPPED_TEXTS),
    "image": ("image.safetensors", "image.json", "image.dropped.jsonl", DROPPED_DOCUMENTS),
}
"""The files of the tokenizer folder that each kind replaces."""
DEFAULT_IMAGE_CONFIG = "chameleon_512"


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
        type=IDS,
        metavar="N",
        help="codebook size of the image tokenizer (default: that of the one in DIR)",
    )
    _add_grid_options(text)
    image = add_action(
        kinds, "image", "train a VQGAN, which turns images into codes, or take another"
    )
    image.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, folders, or documents, as for preprocess (their key `weight` says how "
        "often an image is drawn)",
    )
    image.add_argument("--output", required=True, metavar="DIR", help="the tokenizer folder")
    image.add_argument(
        "--config",
        metavar="NAME|YAML",
        help="a preset (chameleon_512, digits) or a YAML file; section.key=value replaces values "
        f"(default: {DEFAULT_IMAGE_CONFIG})",
    )
    _add_source_options(image)
    image.add_argument(
        "--seed", type=SEED, default=1, metavar="N", help="seed of the training (default: 1)"
    )
    image.add_argument(
        "--restart",
        action="store_true",
        help="start over, and discard the unfinished training in DIR; without it, the same command "
        "continues after a kill",
    )
    _add_run_option(image)
    add_image_options(image)
    image.set_defaults(overrides=[])
    for kind in (text, image):
        add_common_options(kind, nested=True)


def _add_run_option(image: argparse.ArgumentParser) -> None:
    image.add_argument(
        "--run",
        dest="run_folder",
        metavar="DIR",
        help=f"folder for metrics.jsonl and report.html (default: {RUN_FOLDER} in the tokenizer "
        "folder)",
    )


def _add_source_options(image: argparse.ArgumentParser) -> None:
    image.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        help="train nothing: take the image tokenizer that another library saved in FOLDER: "
        "Emu3VQVAE, JanusVQVAE or ChameleonVQVAE of transformers, VQModel of diffusers, or one "
        "that an installed package adds",
    )
    image.add_argument(
        "--resolution",
        type=PIXELS,
        metavar="PIXELS",
        help="with --from: width and height of an image (default: the network's own size)",
    )


def _add_grid_options(text: argparse.ArgumentParser) -> None:
    text.add_argument(
        "--image-grids",
        type=IMAGE_BUDGET,
        metavar="BUDGET",
        help="let pictures keep their shape, with at most BUDGET codes each; without it, every "
        "picture becomes a square",
    )
    text.add_argument(
        "--largest-ratio",
        type=RATIO,
        metavar="RATIO",
        help="with --image-grids: how much longer one side of a picture may be than the other "
        f"(default: {LARGEST_RATIO:g})",
    )


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.outputs import check_name, keep_inputs

    folder = check_name("--output", args.output)
    inputs = args.files if args.kind == "text" else args.images
    keep_inputs("--output", [folder / name for name in WRITTEN[args.kind]], inputs)
    if args.kind == "text":
        _train_text(args)
    elif args.source is not None:
        _import_image(args)
    else:
        _check_trains(args)
        _train_image(args)


def _check_trains(args: argparse.Namespace) -> None:
    """Refuse a training without images, and what has no effect on one.

    Raises:
        ConfigError: It says which.
    """
    if args.resolution is not None:
        what, remedy = "goes only with --from", "To train, use model.resolution=PIXELS"
        raise ConfigError("--resolution", what, remedy)
    if not args.images:
        what = "there are neither images nor --from FOLDER"
        remedy = (
            "Name images, folders or documents to train on, or the folder of another library's "
        )
        raise ConfigError("tokenizer image", what, remedy + "image tokenizer")


def _import_image(args: argparse.Namespace) -> None:
    """Take another library's image tokenizer.

    Raises:
        ConfigError: Something that belongs to a training is given too.
    """
    given = [*args.images, *args.overrides]
    given += ["--config"] if args.config is not None else []
    given += ["--restart"] if args.restart else []
    if given:
        what = f"trains nothing, but {given[0]} is for training"
        raise ConfigError("--from", what, "Leave one of them out")
    start_seconds = time.perf_counter()
    from megatron_chameleon.tokenizer.image.importing import describe_import, import_network

    with announced(f"reading the image tokenizer of {args.source}"):
        made = import_network(args.source, args.output, args.resolution)
    seconds = time.perf_counter() - start_seconds
    show(f"{args.output}: image tokenizer {describe_import(made)}, in {seconds:.1f} s")


def _shapes(args: argparse.Namespace) -> Shapes | None:
    """The grids that the options ask for.

    Raises:
        ConfigError: The budget has no room for the ratio, or a ratio stands alone.
    """
    if args.image_grids is not None:
        return Shapes(args.image_grids, args.largest_ratio or LARGEST_RATIO)
    if args.largest_ratio is None:
        return None
    what = "has no effect without --image-grids, because all pictures become squares"
    raise ConfigError("--largest-ratio", what, "Add --image-grids BUDGET, such as 1024")


def _train_text(args: argparse.Namespace) -> None:
    from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments
    from megatron_chameleon.data.tokenizer_corpus.texts import read_texts
    from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

    start_seconds = time.perf_counter()
    shapes = _shapes(args)
    dropped = DroppedDocuments()
    try:
        with announced(f"reading {counted(len(args.files), 'file')} and training on their text"):
            texts = read_texts(args.files, dropped)
            sizes = (args.vocab_size, _image_codes(args), shapes)
            vocabulary = train_text_tokenizer(texts, args.output, *sizes)
    finally:
        _report(dropped)
    dropped.write(Path(args.output) / DROPPED_TEXTS)
    seconds = time.perf_counter() - start_seconds
    show(
        f"{args.output}: text tokenizer with {vocabulary.size} ids, "
        f"{vocabulary.image_codes} of them image codes{_grids_in_words(vocabulary)}, "
        f"in {seconds:.1f} s"
    )


def _image_codes(args: argparse.Namespace) -> int:
    """The size of the codebook: as given, or that of the image tokenizer in the folder.

    Raises:
        ConfigError: There is neither.
    """
    if args.image_codes is not None:
        return int(args.image_codes)
    from megatron_chameleon.tokenizer.folder import has_image_tokenizer
    from megatron_chameleon.tokenizer.image.facts import codes_and_grid

    if not has_image_tokenizer(args.output):
        what = f"is not given, and {args.output} has no image tokenizer to take the number from"
        remedy = "Give the codebook size, or run `chameleon tokenizer image` first"
        raise ConfigError("--image-codes", what, remedy)
    return codes_and_grid(args.output)[0]


def _grids_in_words(vocabulary: "Vocabulary") -> str:
    if vocabulary.shapes is None:
        return ""
    shapes = vocabulary.shapes
    return (
        f" and {len(shapes.grids)} grids of pictures, from {shapes.grids[0]} to "
        f"{shapes.grids[-1]} codes"
    )


def _train_image(args: argparse.Namespace) -> None:
    with one_of_a_job(debug=args.debug) as launch:
        _train_image_here(args, launch)


def _train_image_here(args: argparse.Namespace, launch: "Launch") -> None:
    from megatron_chameleon.tokenizer.image.config import load_image_config

    start_seconds = time.perf_counter()
    words = [word for word in args.images if is_override(word)]
    config = load_image_config(args.config or DEFAULT_IMAGE_CONFIG, [*words, *args.overrides])

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
        if launch.rank == 0:
            _report(dropped)
    stop = StopRequests()
    with _joined(launch):
        result = train_image_tokenizer(
            images,
            config,
            args.output,
            seed=args.seed,
            device=platform.device(),
            report=_logger.info,
            stop=stop,
            restart=args.restart,
            run=args.run_folder or Path(args.output) / RUN_FOLDER,
            command=masked_command(["chameleon", *sys.argv[1:]]),
        )
    if result is None:
        sys.exit(stop.exit_code())
    if launch.rank > 0:
        return
    dropped.write(Path(args.output) / DROPPED_DOCUMENTS)
    show(
        f"{args.output}: image tokenizer from {counted(result.images, 'image')} "
        f"({result.dropped} dropped), "
        f"{result.psnr:.1f} dB, {result.codes_used} of {result.codebook_size} codes used, "
        f"in {time.perf_counter() - start_seconds:.1f} s"
    )


@contextmanager
def _joined(launch: "Launch") -> Iterator[None]:
    """With several processes, they form a process group while the block runs."""
    if launch.world_size == 1:
        yield
        return
    import torch

    from megatron_chameleon.parallel.launch import join_process_group

    join_process_group(launch)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _report(dropped: "DroppedDocuments") -> None:
    dropped.unused_keys.report()
    if summary := dropped.summary():
        _logger.warning("%s", summary)
