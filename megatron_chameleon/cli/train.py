"""``chameleon train CONFIG``: train alone, or under torchrun, srun, mpiexec or deepspeed."""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import CONFIG, add_overrides
from megatron_chameleon.cli.ranks import one_of_a_job

if TYPE_CHECKING:
    from megatron_chameleon.parallel.launch import Launch
    from megatron_chameleon.training.run.inputs import RunInputs

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
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (the default): resume from the newest checkpoint of the run's line; never: "
        "start at step 0, in a run folder without checkpoints; PATH: start from that checkpoint if "
        "the run has none yet, or go back to one of the run's own and set later ones aside. The "
        "same command, given again, goes on from the newest checkpoint",
    )
    parser.add_argument(
        "--start-from",
        metavar="PATH",
        help="begin at step 0 with the weights of a checkpoint of any format: a folder in Hugging "
        "Face's or Meta's format, a converted one, DeepSpeed's, another run or one of its "
        "checkpoints. Settings of the model and tokenizer.path are taken from it where the config "
        "has none. The same command, given again, goes on from the run's newest checkpoint",
    )


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.config import paper
    from megatron_chameleon.config.checks.check import check_config, smallest_world_size
    from megatron_chameleon.config.load import load_config
    from megatron_chameleon.config.names import find_config
    from megatron_chameleon.errors import ConfigError

    if args.no_step and not args.dry_run:
        raise ConfigError("--no-step", "it goes with --dry-run only", "Add --dry-run, or remove it")
    if args.start_from is not None and args.resume != "auto":
        what = f"it does not go with --resume {args.resume}"
        raise ConfigError(f"--start-from {args.start_from}", what, "Give one of the two")
    with one_of_a_job(debug=args.debug, is_shown=not args.no_step) as launch:
        config = load_config(find_config(args.config), args.overrides)
        world_size = launch.world_size
        if args.dry_run and launch.launcher == "alone":
            # check as if the smallest possible number of processes had been started
            world_size = smallest_world_size(config.parallel)
        check_config(config, world_size)  # before the imports, which take seconds

        from megatron_chameleon.training.loop import train
        from megatron_chameleon.training.prepare import prepare_run
        from megatron_chameleon.training.records.notify import receiver_warning

        resume, weights_only = args.start_from or args.resume, args.start_from is not None
        inputs = prepare_run(config, world_size, resume, weights_only=weights_only)
        if launch.rank == 0:
            receiver = receiver_warning(config.logging)
            for line in (*paper.warnings(config), *inputs.warnings(), receiver):
                if line:
                    _logger.warning(line)
        if args.dry_run:
            _dry_run(inputs, launch, world_size, with_step=not args.no_step)
            return
        finished = train(inputs, launch)
    if not finished:
        from megatron_chameleon.training.faults.signals import EXIT_CODE

        sys.exit(EXIT_CODE)


def _dry_run(inputs: "RunInputs", launch: "Launch", world_size: int, *, with_step: bool) -> None:
    """Print what the run would do, and try its next step."""
    from megatron_chameleon.training.dry_run import describe_dry_run, try_step

    if launch.rank == 0:
        show(describe_dry_run(inputs, launch, world_size))
    found = try_step(inputs, launch, world_size) if with_step else ""
    if found and launch.rank == 0:
        show(found)
