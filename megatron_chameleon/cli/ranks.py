"""What verbs that answer do in a job of several processes, which share one model.

``torchrun --nproc-per-node 4 -m megatron_chameleon generate RUN`` answers on rank 0, and the other
ranks work for it.
"""

import argparse
import logging
import sys

from megatron_chameleon import announce
from megatron_chameleon.cli.logs import progress


def follows(args: argparse.Namespace) -> bool:
    """On another rank than 0, work for rank 0 until it ends.

    Args:
        args: With ``checkpoint``, ``tokenizer``, ``ema`` and ``debug``.

    Returns:
        Whether this is another rank; if so, the verb has nothing left to do.
    """
    from megatron_chameleon.errors import ChameleonError
    from megatron_chameleon.parallel.launch import (
        describe_launch,
        find_launch,
        is_reported_by_rank_0,
    )

    launch = find_launch()
    if place := describe_launch(launch):
        progress(place)
    if launch.rank == 0:
        return False
    logging.getLogger(announce.__name__).setLevel(logging.WARNING)  # rank 0 speaks for all
    try:
        from megatron_chameleon.inference import job

        job.follow(args.checkpoint, args.tokenizer, ema=args.ema)
    except ChameleonError as error:
        if not args.debug and is_reported_by_rank_0(launch):
            sys.exit(error.exit_code)
        raise
    return True
