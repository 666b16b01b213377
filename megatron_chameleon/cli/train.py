"""``chameleon train CONFIG``: train alone, or under torchrun, srun, mpiexec or deepspeed."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import CONFIG, add_overrides
from megatron_chameleon.cli.ranks import one_of_a_job
from megatron_chameleon.cli.starting import add_start_from
from megatron_chameleon.training.inheriting import load_inheriting, tokenizer_in_place

if TYPE_CHECKING:
    from megatron_chameleon.config.schema import Config
    from megatron_chameleon.parallel.launch import Launch
    from megatron_chameleon.training.dry_run import DryRun, TriedStep

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    add_overrides(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, do the step that comes next as it was launched, and keep nothing",
    )
    parser.add_argument(
        "--no-step", action="store_true", help="with --dry-run: only check, without the step"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="with --dry-run: also write what it finds as an HTML page: layout, parameters, memory "
        "and time, the mixture, the steps, and possible problems",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (the default): resume from the newest checkpoint of the run's line; never: "
        "start at step 0, in a run folder without checkpoints; PATH: start from that checkpoint if "
        "the run has none yet, or go back to one of the run's own and set later ones aside. The "
        "same command, given again, goes on from the newest checkpoint",
    )
    add_start_from(
        parser,
        ". The same command, given again, goes on from the run's newest checkpoint. --resume takes "
        "folders in Hugging Face's and Meta's format as well",
    )


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.names import find_config
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.outputs import check_output

    if args.no_step and not args.dry_run:
        raise ConfigError("--no-step", "it goes with --dry-run only", "Add --dry-run, or remove it")
    if args.html is not None and not args.dry_run:
        raise ConfigError("--html", "it goes with --dry-run only", "Add --dry-run, or remove it")
    if args.start_from is not None and args.resume != "auto":
        what = f"it does not go with --resume {args.resume}"
        raise ConfigError(f"--start-from {args.start_from}", what, "Give one of the two")
    with one_of_a_job(debug=args.debug, is_shown=not args.no_step) as launch:
        if args.html is not None and launch.rank == 0:
            check_output("--html", args.html, [find_config(args.config)])
        start_from = args.start_from or _weights_to_resume(args.resume)
        config, weights = load_inheriting(find_config(args.config), args.overrides, start_from)
        world_size = launch.world_size
        if args.dry_run and launch.launcher == "alone":
            # check as if the smallest possible number of processes had been started
            world_size = smallest_world_size(config.parallel)
        _check_tokenizer_named(config, args.resume)
        check_config(config, world_size)  # before the imports, which take seconds
        with tokenizer_in_place(config, weights, launch.rank, keep=not args.dry_run) as ready:
            finished = _start(args, ready, config, launch, world_size)
    if not finished:
        from megatron_chameleon.training.faults.signals import EXIT_CODE

        sys.exit(EXIT_CODE)


def _start(
    args: argparse.Namespace,
    config: "Config",
    shown: "Config",
    launch: "Launch",
    world_size: int,
) -> bool:
    """Train, or do a dry run.

    Args:
        args: Of the verb.
        config: The run's.
        shown: The config that the run will write.
        launch: The place of this process.
        world_size: Number of processes that the config was checked for.

    Returns:
        Whether all steps were done.
    """
    from megatron_chameleon.config import paper
    from megatron_chameleon.training.dry_run import DryRun
    from megatron_chameleon.training.loop import train
    from megatron_chameleon.training.prepare import prepare_run
    from megatron_chameleon.training.records.notify import receiver_warning

    resume, weights_only = args.start_from or args.resume, args.start_from is not None
    inputs = prepare_run(config, world_size, resume, weights_only=weights_only)
    warnings = []
    if launch.rank == 0:
        receiver = receiver_warning(config.logging)
        warnings = list(filter(None, (*paper.warnings(config), *inputs.warnings(), receiver)))
        for line in warnings:
            _logger.warning(line)
    if args.dry_run:
        # The run's own config, whose steps follow from its epochs, with the tokenizer's real place.
        planned = replace(inputs.config, tokenizer=shown.tokenizer)
        _dry_run(args, DryRun(inputs, planned, launch, world_size, warnings))
        return True
    return train(inputs, launch)


def _weights_to_resume(resume: str) -> str | None:
    """The path that ``--resume`` names if it is a folder of weights alone."""
    from megatron_chameleon.checkpoint.state.folders import has_only_weights

    return resume if resume not in ("auto", "never") and has_only_weights(Path(resume)) else None


def _check_tokenizer_named(config: "Config", resume: str) -> None:
    """Say where the tokenizer of the checkpoint to resume from is, if the config names none.

    Raises:
        ConfigError: ``tokenizer.path`` is not set.
    """
    from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config
    from megatron_chameleon.errors import ConfigError

    if config.tokenizer.path or not (Path(resume) / "config.yaml").is_file():
        return
    recorded = load_checkpoint_config(Path(resume)).tokenizer.path
    raise ConfigError(
        "tokenizer.path",
        "not set, and --resume does not take it from the checkpoint",
        f"Set it to the checkpoint's, {recorded}, or begin at step 0 with --start-from {resume}, "
        "which inherits it",
    )


def _dry_run(args: argparse.Namespace, plan: "DryRun") -> None:
    """Print what the run would do, and try its next step. With ``--html``, write it as a page.

    Raises:
        ChameleonError: The step cannot be done; the page says it too.
    """
    from megatron_chameleon.errors import ChameleonError
    from megatron_chameleon.training.dry_run import TriedStep, describe_dry_run, try_step

    is_first = plan.launch.rank == 0
    if is_first:
        show(describe_dry_run(plan))
    tried = TriedStep("")
    try:
        if not args.no_step:
            tried = try_step(plan.inputs, plan.launch, plan.world_size)
    except ChameleonError as error:
        if is_first and args.html is not None:
            _write_page(args, plan, TriedStep("\n".join(error.lines()), failed=True))
        raise
    if is_first:
        if tried.text:
            show(tried.text)
        if args.html is not None:
            _write_page(args, plan, tried)


def _write_page(args: argparse.Namespace, plan: "DryRun", tried: "TriedStep") -> None:
    from megatron_chameleon.cli.origins import page_origin
    from megatron_chameleon.files import write_text
    from megatron_chameleon.training.dry_run_page import dry_run_page

    page = dry_run_page(plan, tried, page_origin(args))
    write_text(Path(args.html), page)
    show(args.html)
