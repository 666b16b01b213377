r"""``chameleon evaluate-modalities CHECKPOINT``: does a model answer as it is asked to?

chameleon evaluate-modalities runs/sft
chameleon evaluate-modalities exported --data tokens/chat-holdout --output modalities
torchrun --standalone --nproc-per-node 2 -m megatron_chameleon evaluate-modalities runs/7b
"""

import argparse
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.asked import add_device_option, check_device
from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import (
    ASKED_PROMPTS,
    add_checkpoint_argument,
    add_ema_option,
    add_json_option,
    add_tokenizer_option,
)
from megatron_chameleon.cli.ranks import follows
from megatron_chameleon.terminal import escape_line

if TYPE_CHECKING:
    from megatron_chameleon.checkpoint.formats.base import CheckpointReader
    from megatron_chameleon.data.mixture.corpus import Corpus
    from megatron_chameleon.inference.session import Session
    from megatron_chameleon.runs.answers.modalities import ModalityCheck


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="PREFIX",
        default=[],
        help="token files of conversations to ask (default: those of data.validation in the run's "
        "config; built-in prompts stand in where there are none)",
    )
    parser.add_argument(
        "--prompts",
        type=ASKED_PROMPTS,
        default=16,
        metavar="N",
        help="prompts for each kind of answer: text, one image, both (default: 16)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for modalities.json and the answers (default: modalities/STEP in the run "
        "folder; none for an exported folder)",
    )
    add_tokenizer_option(parser)
    add_ema_option(parser)
    add_device_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> None:
    """Ask the model, print what it answered, and keep it in the run folder."""
    if follows(args):
        return
    from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
    from megatron_chameleon.inference.job import open_session
    from megatron_chameleon.outputs import check_output_folder

    check_device(args)
    reader = open_checkpoint(args.checkpoint, ema=args.ema)
    folder = _folder_in_run(args, reader.step) if args.output is None else Path(args.output)
    if folder is not None:
        check_output_folder("--output", folder)
    corpora = _open_corpora(reader, args)
    with closing(
        open_session(args.checkpoint, args.device, args.tokenizer, ema=args.ema)
    ) as session:
        check = _check(session, corpora, folder, args)
    if reader.conversations is False:
        check.notes.append("The model was not trained on conversations, as far as its files say.")
    _show(check, args)
    if folder is not None:
        progress(f"written: {folder}")


def _folder_in_run(args: argparse.Namespace, step: int) -> Path | None:
    """Where a run keeps what was found; None if the checkpoint is none of a run."""
    from megatron_chameleon.checkpoint.state.folders import step_folder
    from megatron_chameleon.errors import DataError
    from megatron_chameleon.runs.answers.modalities import FOLDER
    from megatron_chameleon.runs.run import find_run

    if args.ema:  # another model than the one of the step
        return None
    try:
        return find_run(args.checkpoint) / FOLDER / step_folder(step)
    except DataError:
        return None


def _open_corpora(reader: "CheckpointReader", args: argparse.Namespace) -> "list[Corpus]":
    """The held-out documents: those that were given, or the run's; none if there are none."""
    from megatron_chameleon.checkpoint.formats.opening import open_tokenizer
    from megatron_chameleon.config.schema import SourceConfig
    from megatron_chameleon.data.batches.open_sources import open_listed
    from megatron_chameleon.errors import ConfigErrors

    of_run = reader.config.data.validation.sources if reader.config is not None else []
    prefixes = args.data or [source.prefix for source in of_run]
    if not prefixes:
        return []
    where = "--data" if args.data else "data.validation.sources"
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(reader, args.tokenizer, Path(scratch))
        sources = [SourceConfig(prefix) for prefix in prefixes]
        opened, problems = open_listed(where, 0, sources, reader.model.seq_length, tokenizer)
    if problems:
        raise ConfigErrors(problems)
    return [source.corpus for source in opened]


def _check(
    session: "Session", corpora: "list[Corpus]", folder: Path | None, args: argparse.Namespace
) -> "ModalityCheck":
    from megatron_chameleon.errors import DataError
    from megatron_chameleon.training.modalities.at_end import progress_lines
    from megatron_chameleon.training.modalities.check import (
        ask_prompts,
        count_modalities,
        write_check,
    )
    from megatron_chameleon.training.modalities.prompts import built_in_prompts, held_out_prompts
    from megatron_chameleon.wording import counted

    tokenizer, context = session.tokenizer, session.context_tokens
    prompts = held_out_prompts(corpora, tokenizer, context, args.prompts)
    built_in = built_in_prompts(tokenizer, context, prompts)
    if not prompts and not built_in:
        what = f"no prompt leaves room for an image in the context of {context:,} tokens"
        raise DataError("--data", what, "Give shorter conversations")
    progress(f"the model answers {counted(len(prompts) + len(built_in), 'prompt')}")
    asked = [*prompts, *built_in]
    answers = ask_prompts(session, asked, progress_lines(progress))
    check = count_modalities(session.step, asked, answers, tokenizer)
    if folder is not None:
        write_check(folder, check, asked, answers, tokenizer)
    return check


def _show(check: "ModalityCheck", args: argparse.Namespace) -> None:
    if args.json:
        show(json.dumps({"checkpoint": args.checkpoint, **check.as_json()}, indent=1))
        return
    for text, weight in check.lines():
        show(escape_line(f"{'warning: ' * bool(weight)}{text}"))
    for note in check.notes:
        show(escape_line(f"note: {note}"))
