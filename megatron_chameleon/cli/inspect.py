"""``chameleon inspect PREFIX --html FILE``: show a token file as the model will see it.

With a config instead of a prefix, it shows the mixture of the run; the page then shows the packed
sequences of a step. With a file or folder of documents, it shows how ``chameleon preprocess`` would
understand them; no tokenizer is needed.
"""

import argparse
import logging
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.config import load_checked
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    COUNT,
    INDEX,
    add_image_options,
    add_overrides,
    image_options,
)
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.cli.tokenizer_folders import TOKENIZER, tokenizer_folder
from megatron_chameleon.training.inheriting import tokenizer_in_place
from megatron_chameleon.wording import counted

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefix",
        metavar="PREFIX|CONFIG|INPUT",
        help="a token file without .bin and .idx, the YAML config of a run, or documents as "
        "`chameleon preprocess` reads them (such as a .jsonl file, or a folder of `datasets`)",
    )
    add_overrides(parser, "with a config")
    add_start_from(parser)
    parser.add_argument(
        "--html", metavar="FILE", help="also write the documents or sequences as an HTML page"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help=f"{TOKENIZER}; by default the one that the token file or the config names",
    )
    parser.add_argument(
        "--documents",
        type=COUNT,
        metavar="N",
        help="number of documents on the page (default: 20); of an input also in the terminal "
        "(default: 3)",
    )
    parser.add_argument(
        "--start",
        type=INDEX,
        default=0,
        metavar="K",
        help="index of the first document on the page (default: 0)",
    )
    parser.add_argument(
        "--step",
        type=COUNT,
        default=1,
        metavar="N",
        help="with a config: the step whose sequences the page shows, counted from 1 (default: 1)",
    )
    parser.add_argument(
        "--sequences",
        type=COUNT,
        default=8,
        metavar="N",
        help="with a config: number of sequences on the page (default: 8)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check every length, offset and image of the index"
    )
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    if _is_input(args.prefix):
        _inspect_input(args)
    elif _is_config(args.prefix):
        _inspect_mixture(args)
    else:
        _inspect_token_file(args)


def _is_input(name: str) -> bool:
    """Whether it names documents, rather than a token file or a config."""
    from megatron_chameleon.data.inputs.files import has_documents

    try:
        if Path(f"{name}.idx").exists():
            return False
        is_folder = Path(name).is_dir()
        is_configured = is_folder and any(Path(name).glob("*.y*ml"))
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False
    if "://" in name:  # token files and configs are local
        return True
    return has_documents(name) or (is_folder and not is_configured and any(Path(name).iterdir()))


def _inspect_input(args: argparse.Namespace) -> None:
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.data.views.raw_input import (
        describe_documents,
        describe_input,
        look_at_input,
        write_input_page,
    )

    _refuse_words_of_configs(args, "an input")
    _check_page(args, [args.prefix])
    most = args.documents or (20 if args.html else 3)
    with announced(f"reading {args.prefix}"):
        found = look_at_input(args.prefix, image_options(args), most, args.start)
    show(describe_input(args.prefix, found))
    if args.html:
        written = write_input_page(Path(args.html), args.prefix, found, page_origin(args))
        show(f"{args.html}: {counted(written, 'document')}")
    elif found.first:
        show(describe_documents(found.first))


def _is_config(name: str) -> bool:
    """Whether it names a config in the way of the other verbs, rather than a token file."""
    from megatron_chameleon.config.names import SUFFIXES, preset_names

    try:
        if Path(f"{name}.idx").exists():
            return False
        is_folder = Path(name).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        is_folder = False
    return name.endswith(SUFFIXES) or is_folder or name in preset_names()


def _inspect_mixture(args: argparse.Namespace) -> None:
    _check_page(args, [args.prefix])
    config, weights = load_checked(args.prefix, args.overrides, args.start_from)

    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.data.preprocess.encode import load_for_encoding
    from megatron_chameleon.data.views.audit import audit_step
    from megatron_chameleon.data.views.mixture import mixture_summary
    from megatron_chameleon.data.views.sequence_page import write_sequence_page
    from megatron_chameleon.training.run.open_data import open_newest

    with (
        tokenizer_in_place(config, weights, 0, keep=False) as ready,
        tokenizer_folder(args.tokenizer or ready.tokenizer.path) as folder,
    ):
        tokenizer = load_for_encoding(folder)
    with announced("reading the indices of the data sources"):
        reader = open_newest(config, tokenizer)
    show(mixture_summary(reader))
    for line in reader.warnings():
        _logger.warning(line)
    if args.html:
        with announced(f"writing {args.html}"):
            audit = audit_step(reader, args.step)
            written = write_sequence_page(
                *(Path(args.html), audit, reader, tokenizer, args.sequences, page_origin(args))
            )
        show(f"{args.html}: {written} sequences")


def _inspect_token_file(args: argparse.Namespace) -> None:
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.data.preprocess.encode import load_for_encoding
    from megatron_chameleon.data.token_files.format import ANSWERS_SUFFIX, REQUIRED_SUFFIXES
    from megatron_chameleon.data.token_files.reader import open_token_file, read_info
    from megatron_chameleon.data.views.token_file_page import (
        token_file_summary,
        write_token_file_page,
    )
    from megatron_chameleon.errors import CheckpointError, ConfigError, DataError

    _refuse_words_of_configs(args, "a token file")
    names = [args.prefix + suffix for suffix in (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX, ".json")]
    _check_page(args, names)
    try:
        tokenizer = None
        if args.html or args.tokenizer:
            with tokenizer_folder(args.tokenizer or read_info(args.prefix).tokenizer) as folder:
                tokenizer = load_for_encoding(folder)
    except (CheckpointError, DataError) as error:
        if args.tokenizer:
            raise
        raise DataError(error.where, error.what, "Name the folder with --tokenizer DIR") from error
    with announced(f"opening {args.prefix}"):
        token_file = open_token_file(args.prefix, tokenizer)
    if not 0 <= args.start < len(token_file):
        what = f"{args.start}, but {args.prefix} has {len(token_file)} documents"
        raise ConfigError("--start", what, f"Give a number from 0 to {len(token_file) - 1}")
    if args.verify:
        with announced(f"checking the index of {counted(len(token_file), 'document')}"):
            token_file.verify()
        show(f"{args.prefix}: the index agrees with {counted(len(token_file), 'document')}")
    lengths, images = token_file.lengths, token_file.images
    show(token_file_summary(args.prefix, token_file.info, lengths, images))
    if args.html and tokenizer is not None:
        with announced(f"writing {args.html}"):
            written = write_token_file_page(
                *(args.html, token_file, tokenizer, args.start, args.documents or 20),
                page_origin(args),
            )
        show(f"{args.html}: {counted(written, 'document')}")


def _refuse_words_of_configs(args: argparse.Namespace, kind: str) -> None:
    """Refuse overrides and ``--start-from``, which change a config, with something else."""
    from megatron_chameleon.errors import ConfigError

    if args.overrides:
        what = f"{args.prefix} is {kind}, which has no values to override"
        raise ConfigError(args.overrides[0], what, "Remove it, or name a YAML file")
    if args.start_from is not None:
        what = f"{args.prefix} is {kind}, and only a config inherits from weights"
        raise ConfigError(f"--start-from {args.start_from}", what, "Remove it, or name a YAML file")


def _check_page(args: argparse.Namespace, inputs: list[str]) -> None:
    from megatron_chameleon.outputs import check_output

    if args.html is not None:
        check_output("--html", args.html, inputs)
