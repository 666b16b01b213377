"""``chameleon data collect DATA... --output DIR``: write documents for loose pictures and texts.

chameleon data collect photos/ notes/ --output documents
"""

import argparse
import logging
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.wording import counted

_logger = logging.getLogger(__name__)


def add_collect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``data collect``."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="files or folders")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="the folder for pictures.jsonl and texts.jsonl",
    )
    parser.add_argument(
        "--captions",
        choices=("names", "none"),
        default="names",
        help="caption of a picture without a text beside it: the words of its folder's and file's "
        "names (the default), or none",
    )
    parser.add_argument(
        "--exclude",
        metavar="PATH",
        action="append",
        default=[],
        help="a folder or file to pass over; can be repeated",
    )
    parser.add_argument(
        "--claimed",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder from which documents take their pictures: those right in it are left out; "
        "can be repeated",
    )


def run_collect(args: argparse.Namespace) -> None:
    """Find the files, and write the documents."""
    from megatron_chameleon.data.loose.records import collect
    from megatron_chameleon.data.loose.walk import find_loose
    from megatron_chameleon.errors import DataError
    from megatron_chameleon.files import make_folder
    from megatron_chameleon.outputs import check_output_folder

    output = check_output_folder("--output", Path(args.output))
    with announced(f"looking for pictures and texts in {counted(len(args.data), 'path')}"):
        found = find_loose(args.data, [*args.exclude, output], args.claimed)
    if not found.pictures and not found.texts:
        what = f"no loose picture or text among {counted(found.files, 'file')}"
        raise DataError(" ".join(args.data)[:300], what, "Give folders of pictures or .txt files")
    make_folder(output)
    with announced("writing the documents"):
        written = collect(found, output, args.captions)
    for each in written:
        show(f"{each.path}: {counted(each.documents, 'document')} of {counted(each.files, 'file')}")
        for line in each.broken[:5]:
            _logger.warning("left out: %s", line)
    for root in found.roots:
        show(f"the pictures lie below {root}: give it to preprocess as --image-root")
