"""The ``chameleon`` command. Each verb is one file of this folder, imported only when it is used.

A verb's module defines ``add_arguments(parser)`` and ``run(args)``. It imports torch and other
large packages inside ``run``, so that ``chameleon --help`` answers at once.
"""

import argparse
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator

from megatron_chameleon import __version__
from megatron_chameleon.announce import announced_imports
from megatron_chameleon.cli.bugs import report_bug
from megatron_chameleon.cli.console import (
    EXIT_OUTPUT_CLOSED,
    OutputClosed,
    drop_output,
    open_console,
)
from megatron_chameleon.cli.interrupts import end_process, interruptible
from megatron_chameleon.cli.logs import show_error, shown_logs
from megatron_chameleon.cli.options import Parser, add_action, add_common_options
from megatron_chameleon.cli.outside_faults import outside_fault
from megatron_chameleon.cli.shrunken_files import report_shrunken_files
from megatron_chameleon.errors import ChameleonError

OVERRIDE = re.compile(r"[^-=\s][^=\s]*=.*", re.DOTALL)
"""An override (``config/reading/overrides.py``) behind an option, where argparse expects none."""

VERBS = {
    "init": "look at your files, and write a folder with all that a run needs",
    "tokenizer": "train a text tokenizer or an image tokenizer",
    "preprocess": "turn documents into .bin/.idx token files",
    "inspect": "show a token file or the mixture of a run, optionally as an HTML page",
    "data": "filter documents, write refusals, or show what a step of a run saw",
    "config": "compare a config with the paper's values",
    "plan": "predict speed and memory of the parallel layouts on a number of GPUs",
    "train": "train a model from a YAML config",
    "status": "show how runs stand: alive or not, step, loss, checkpoints, alarms",
    "convert": "convert a checkpoint to another format",
    "verify": "compare two checkpoints of any format",
    "chat": "talk to a model in the terminal, in text and images",
    "generate": "generate text and images from a checkpoint",
    "serve": "answer OpenAI's clients and browsers over HTTP",
    "evaluate": "benchmark a checkpoint and show the paper's figures beside it",
    "evaluate-loss": "measure loss and perplexity of a checkpoint on token files",
    "evaluate-modalities": "see whether a model answers in text or images as it is asked to",
    "annotate": "let people judge answers: questionnaires, agreement, win rates, safety",
    "report": "write one HTML page that shows a run",
    "compare": "show how two or more runs went, and how they were set up",
    "plot": "draw the curves of one or more runs",
    "completion": "print the script with which bash, zsh or fish complete commands",
    "doctor": "check what this machine can run and what is missing",
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of one verb only: no other verb's module is imported."""
    parser = Parser(
        prog="chameleon",
        description="Train, convert and run mixed-modal early-fusion models (arXiv 2405.09818).",
    )
    parser.add_argument("--version", action="version", version=f"megatron_chameleon {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        subparser = add_action(subparsers, name, summary)
        if name == verb:
            module = importlib.import_module(f"megatron_chameleon.cli.{name.replace('-', '_')}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
        add_common_options(subparser)
    return parser


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser itself and those of its actions, with theirs.

    ``build_parser(verb)`` has the actions of one verb only.
    """
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from commands(child)


def main(argv: list[str] | None = None) -> None:
    """Run one verb.

    The exit code is 0 after success, 2 after a mistake of the user or a fault of the machine, 1
    after a bug of ours or the end of another process of the job, and 128 + the signal's number
    after a signal.

    Args:
        argv: The words behind ``chameleon``. None: this process is the command; it takes its own
            words, prints through ``console.py`` and ends. With words, the caller is a program, and
            a bug is raised to it.
    """
    if argv is None:
        if "_ARGCOMPLETE" in os.environ:  # the script of `chameleon completion` asks
            from megatron_chameleon.cli.completing import complete

            complete(build_parser, VERBS)
        end_process(_run_process(sys.argv[1:]))
    _run(argv, ends_process=False)


def _run(argv: list[str], ends_process: bool) -> None:
    if argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        argv = argv[1:]  # the deepspeed launcher adds it; LOCAL_RANK holds the same number
    with interruptible(argv, ends_process) as interrupts:
        try:
            interrupts.begin()
            _run_verb(argv)
            if interrupts.received is not None:
                interrupts.end(is_complete=True)
        except BaseException as error:
            # after a signal, all else that fails is a consequence of it
            if interrupts.received is not None or isinstance(error, KeyboardInterrupt):
                interrupts.end()
            if not isinstance(error, Exception):
                raise
            verb = argv[0] if argv else ""
            fault = error if isinstance(error, ChameleonError) else outside_fault(error, verb)
            if fault is None:
                raise
            if "--debug" in argv:
                traceback.print_exc()
            _print_error(fault)
            sys.exit(fault.exit_code)


def _run_verb(argv: list[str]) -> None:
    args = _parse(argv, argv[0] if argv and argv[0] in VERBS else None)
    if not args.debug:  # `chameleon doctor` and our own errors say what matters of these
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
        logging.getLogger("megatron").setLevel(logging.CRITICAL)
    with shown_logs(args.log_level), announced_imports():
        args.run(args)


def _parse(argv: list[str], verb: str | None) -> argparse.Namespace:
    parser = build_parser(verb)
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if OVERRIDE.fullmatch(word)]
    if len(overrides) < len(rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words = argv  # pages say which command has written them
    if overrides:  # argparse does not find section.key=value after an option
        args.overrides = [*args.overrides, *overrides]
    return args


def _run_process(argv: list[str]) -> int:
    """Run one verb as this process; returns its exit code."""
    open_console()
    handler = report_shrunken_files()
    code = 0
    try:
        code = _exit_code(argv)
        sys.stdout.flush()
    except OutputClosed:
        drop_output()
        code = EXIT_OUTPUT_CLOSED
    except ChameleonError as error:  # the last of the output cannot be written
        drop_output()
        if not code:
            _print_error(error)
            code = 2
    del handler
    return code


def _exit_code(argv: list[str]) -> int:
    try:
        _run(argv, ends_process=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception as error:
        report_bug(error, argv)
        return 1
    return 0


def _print_error(error: ChameleonError) -> None:
    for line in error.lines():
        show_error(line)
