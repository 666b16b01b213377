"""``chameleon data filter`` and ``chameleon data refusals``: what is trained, chosen and written.

chameleon data filter 'pairs/*.tar' --output drawn.jsonl --config paper --html look.html
chameleon data filter chat.jsonl --dry-run --min-words 3 --duplicates --near-duplicates 0.8
chameleon data filter web.jsonl --output clean.jsonl --language en --against eval/*.jsonl
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    COUNT,
    FILES,
    INDEX,
    MIB,
    SEED,
    SHARE,
    WORKERS,
    NumberOption,
    add_common_options,
    add_image_options,
    image_options,
)
from megatron_chameleon.cli.tokenizer_folders import TOKENIZER, tokenizer_folder
from megatron_chameleon.config.constraints import Above, Between
from megatron_chameleon.errors import ConfigError

if TYPE_CHECKING:
    from megatron_chameleon.data.filter.measures.options import FilterOptions

SIDE = NumberOption(int, Between(1, 1 << 20))
RATIO = NumberOption(float, Between(1, 1e6))
FACTOR = NumberOption(float, Above(1, at_most=1e6))
SCORE = NumberOption(float, Between(0, 1e9))
SIMILARITY = NumberOption(float, Between(0.3, 0.95))
BITS = NumberOption(int, Between(0, 16))

NOTES = """All filters are off unless they are asked for, except that pictures must be readable.
Each one looks at a whole document: of several pictures the worst one counts. docs/data.md,
"Curation", has more.
"""


def add_filter(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``data filter``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = NOTES
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, quoted globs or URLs")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the new file: .jsonl, .jsonl.gz or .jsonl.zst; beside it appear NAME.filter.json "
        "(counts), NAME.dropped.tsv (what was dropped) and NAME-images (copied pictures)",
    )
    parser.add_argument("--html", metavar="PAGE", help="a page with examples of what was dropped")
    parser.add_argument("--dry-run", action="store_true", help="count, and write no documents")
    parser.add_argument(
        "--config", metavar="YAML", help="a file with filters, or `paper` for the paper's values"
    )
    parser.add_argument("--workers", type=WORKERS, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--shards", type=FILES, default=1, metavar="N", help="write N files of about equal length"
    )
    parser.add_argument(
        "--images",
        choices=("auto", "copy", "embed"),
        default="auto",
        help="auto (the default): refer to pictures below the folder of the new file, and copy all "
        "others; copy: copy all; embed: write them into the lines",
    )
    _add_texts(parser)
    _add_pictures(parser)
    _add_duplicates(parser)
    add_image_options(parser)
    parser.add_argument(
        "--ignore-keys", metavar="KEY,...", default="", help="keys or columns to leave out"
    )
    parser.add_argument(
        "--largest-document", type=MIB, default=128, metavar="MIB", help="as in preprocess"
    )
    parser.add_argument(
        "--largest-text", type=MIB, default=16, metavar="MIB", help="as in preprocess"
    )
    add_common_options(parser, nested=True)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters of texts")
    for unit in ("characters", "words", "tokens"):
        for end, word in (("min", "fewer"), ("max", "more")):
            group.add_argument(
                f"--{end}-{unit}", type=INDEX, metavar="N", help=f"drop with {word} {unit}"
            )
    group.add_argument("--tokenizer", metavar="DIR", help=f"counts tokens: {TOKENIZER}")
    group.add_argument(
        "--language",
        action="append",
        dest="languages",
        metavar="CODE",
        help="keep this language, such as en; can be repeated (extra `curation`)",
    )
    group.add_argument(
        "--min-language-probability", type=SHARE, metavar="P", help="drop below (default: 0)"
    )
    group.add_argument(
        "--blocklist",
        action="append",
        dest="blocklists",
        metavar="FILE",
        help="safety list: words, phrases, `re:` expressions and hashes of pictures, one per line; "
        "can be repeated",
    )
    group.add_argument(
        "--blocklist-parts-of-words",
        action="store_true",
        default=None,
        help="find entries inside of longer words too",
    )
    group.add_argument(
        "--blocklist-case", action="store_true", default=None, help="upper and lower case differ"
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters of pictures")
    group.add_argument(
        "--no-check-images",
        action="store_false",
        dest="check_images",
        default=None,
        help="do not open pictures that no filter needs; by default, unreadable ones are dropped",
    )
    for side in ("width", "height"):
        for end, word in (("min", "smallest"), ("max", "largest")):
            text = f"{word} {side} of a picture"
            group.add_argument(f"--{end}-{side}", type=SIDE, metavar="PIXELS", help=text)
    group.add_argument(
        "--max-aspect-ratio", type=RATIO, metavar="R", help="longer side / shorter side"
    )
    group.add_argument("--min-score", type=SCORE, metavar="S", help="drop below this score")
    group.add_argument("--max-score", type=SCORE, metavar="S", help="drop above this score")
    group.add_argument(
        "--score-key",
        metavar="KEY",
        help="key or column of the score (default: aesthetic_score, aesthetic, ...)",
    )
    group.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="compute the score: a Python function that takes a PIL image and returns a number",
    )
    group.add_argument(
        "--missing-score",
        choices=("drop", "keep"),
        help="what to do with pictures without a score (default: drop)",
    )
    group.add_argument("--nearest", metavar="WxH", help="the wanted size, such as 512x512")
    group.add_argument(
        "--keep-nearest", type=COUNT, metavar="N", help="keep the N documents nearest to that size"
    )
    group.add_argument(
        "--nearest-factor", type=FACTOR, metavar="X", help="drop sides further off than this factor"
    )


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("duplicates")
    group.add_argument(
        "--duplicates", action="store_true", default=None, help="drop equal texts and pictures"
    )
    group.add_argument(
        "--duplicate-images",
        action="store_true",
        default=None,
        help="drop documents with a picture of another one",
    )
    group.add_argument(
        "--near-duplicates",
        type=SIMILARITY,
        metavar="J",
        help="drop texts that share this part of their sequences of 5 words, such as 0.8 (MinHash; "
        "extra `curation`); with pictures, only if those are equal",
    )
    group.add_argument(
        "--near-images",
        type=BITS,
        metavar="BITS",
        help="drop pictures whose perceptual hash differs in at most so many of 64 bits, such as 4 "
        "(extra `curation`)",
    )
    group.add_argument(
        "--keep", choices=("first", "best"), help="which duplicate stays: first, or best score"
    )
    group.add_argument(
        "--against",
        action="append",
        metavar="FILE",
        help="drop what these documents have, such as evaluation sets; can be repeated",
    )


def run_filter(args: argparse.Namespace) -> None:
    """Run ``data filter``."""
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.data.filter.measures.measure import ReadOptions
    from megatron_chameleon.data.filter.run import RunOptions, filter_documents
    from megatron_chameleon.data.filter.write import suffix_of_output
    from megatron_chameleon.data.inputs.records import Limits
    from megatron_chameleon.outputs import check_name

    if args.output is None and not args.dry_run:
        raise ConfigError("--output", "is missing", "Name a .jsonl file, or use --dry-run")
    if args.output is not None:
        check_name("--output", args.output, ConfigError)
        suffix_of_output(args.output)
    options = _filter_options(args)
    read = ReadOptions(
        image_options(args),
        Limits(args.largest_document << 20, args.largest_text << 20),
        tuple(sorted({key for key in args.ignore_keys.split(",") if key})),
    )
    run = RunOptions(
        None if args.dry_run else args.output,
        args.shards,
        args.images,
        args.html,
        page_origin(args),
        args.workers,
        read,
    )
    with _with_tokenizer(options) as ready:
        result = filter_documents(args.inputs, ready, run).to_json()
    show(format_counts(result, args.output if not args.dry_run else None))


@contextmanager
def _with_tokenizer(options: "FilterOptions") -> "Iterator[FilterOptions]":
    """The options whose tokenizer, if they name one, is a tokenizer folder."""
    if options.tokenizer is None:
        yield options
        return
    with tokenizer_folder(options.tokenizer) as folder:
        yield replace(options, tokenizer=str(folder))


def _filter_options(args: argparse.Namespace) -> "FilterOptions":
    """The filters of ``--config``, with those of the command line in their place."""
    from megatron_chameleon.config.load import load_dataclass
    from megatron_chameleon.data.filter.measures.options import PAPER, FilterOptions, paper_options

    options = FilterOptions()
    if args.config == PAPER:
        options = paper_options()
    elif args.config is not None:
        options = load_dataclass(FilterOptions, Path(args.config), [])
    given = {
        name: getattr(args, name)
        for name in (field.name for field in fields(FilterOptions))
        if getattr(args, name, None) is not None
    }
    options = replace(options, **given)
    options.check()
    return options


def format_counts(result: dict[str, Any], output: str | None) -> str:
    """The counts as a table for the terminal."""
    total, kept = result["documents"], result["kept"]
    rows = [("filter", "sees", "drops", "alone", "setting")]
    for reason, count in result["unreadable"].items():
        rows.append((f"unreadable: {reason}", f"{total:,}", f"{count:,}", "", ""))
    for one in result["filters"]:
        counts = (f"{one[name]:,}" for name in ("seen", "dropped", "alone"))
        rows.append((one["name"], *counts, one["setting"]))
    rows.append(("kept", "", f"{kept:,}", "", f"{100 * kept / max(total, 1):.1f}% of {total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3)), row[4]]
        lines.append("  ".join(cells).rstrip())
    if output is not None:
        names = result["files"]
        where = output if len(names) == 1 else f"{names[0]} to {names[-1]}"
        copied = result["copied_images"]
        lines.append(
            f"{where}: {kept:,} documents" + (f", {copied:,} copied images" * bool(copied))
        )
    return "\n".join(lines)


def add_refusals(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``data refusals``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "A prompt is a line of a .txt, or a document of any other input; its key `topic` is named\n"
        "in some answers. Nobody checks that the prompts are unsafe: a model that is trained on\n"
        "refusals alone refuses harmless requests too, so mix in answered ones.\n"
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPTS", help="files of prompts")
    parser.add_argument("--output", metavar="FILE", required=True, help="the new .jsonl file")
    parser.add_argument("--seed", type=SEED, default=1, help="seed of the choice (default: 1)")
    parser.add_argument(
        "--answers", type=FILES, default=1, metavar="N", help="refusals per prompt (default: 1)"
    )
    add_image_options(parser)
    add_common_options(parser, nested=True)


def run_refusals(args: argparse.Namespace) -> None:
    """Run ``data refusals``."""
    from megatron_chameleon.data.filter.refusals import write_refusals

    found = write_refusals(args.prompts, args.output, args.seed, args.answers, image_options(args))
    show(
        f"{args.output}: {found.pairs:,} refusals of {found.prompts:,} prompts, "
        f"{found.drawings:,} of which ask for a picture"
    )
