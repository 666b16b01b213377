"""What verbs do in a job of several processes: rank 0 speaks for all, and reports an error once.

``torchrun --nproc-per-node 4 -m megatron_chameleon generate RUN`` answers on rank 0, and the other
ranks work for it.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_chameleon import announce
from megatron_chameleon.cli.logs import progress

if TYPE_CHECKING:
    from megatron_chameleon.parallel.launch import Launch


@contextmanager
def one_of_a_job(*, debug: bool, is_shown: bool = True) -> Iterator["Launch"]:
    """The place of this process among those of its launcher, while the block runs.

    An error that rank 0 reports too ends the other ranks without a word.

    Args:
        debug: Whether every rank shows its errors.
        is_shown: Whether the place is shown, which comes before imports that take seconds.
    """
    from megatron_chameleon.errors import ChameleonError
    from megatron_chameleon.parallel.launch import (
        describe_launch,
        find_launch,
        is_reported_by_rank_0,
    )

    launch = find_launch()
    if is_shown and (place := describe_launch(launch)):
        progress(place)
    if launch.rank > 0:
        logging.getLogger(announce.__name__).setLevel(logging.WARNING)  # rank 0 speaks for all
    try:
        yield launch
    except ChameleonError as error:
        if not debug and is_reported_by_rank_0(launch):
            sys.exit(error.exit_code)
        raise


def follows(args: argparse.Namespace) -> bool:
    """On another rank than 0, work for rank 0 until it ends.

    Args:
        args: With ``checkpoint``, ``tokenizer``, ``ema`` and ``debug``.

    Returns:
        Whether this is another rank; if so, the verb has nothing left to do.
    """
    with one_of_a_job(debug=args.debug) as launch:
        if launch.rank == 0:
            return False
        from megatron_chameleon.inference import job

        job.follow(args.checkpoint, args.tokenizer, ema=args.ema)
    return True
