"""``mpiexec -n N chameleon preprocess ...``: each rank writes a shard, and the first merges them.

MPI carries no data. The ranks share the file system and only tell each other whether they failed.
"""

import atexit
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.data.preprocess.merge_shards import merge_shards
from megatron_chameleon.data.preprocess.options import PreprocessOptions
from megatron_chameleon.data.preprocess.progress import find_shards
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.parallel.launch import Launch, run_alone


def preprocess_on_ranks(
    inputs: Sequence[str],
    tokenizer: str | Path,
    prefix: str,
    options: PreprocessOptions,
    launch: Launch,
    keep: bool = False,
) -> None:
    """Preprocess on all ranks of an MPI job.

    If a rank fails, the others still finish their shards, and the same command resumes from there.

    Args:
        inputs: As for ``preprocess``.
        tokenizer: The tokenizer folder.
        prefix: The token file.
        options: The options of each rank; the shard is replaced by the rank's own.
        launch: What the launcher's environment variables say.
        keep: Whether to keep the shards after merging them.

    Raises:
        ConfigError: If mpi4py is missing or counts other processes than the launcher.
        DataError: If this rank or another one failed.
    """
    world = _world(launch)
    failure: ChameleonError | None = None
    try:
        shard = (world.rank, world.size)
        preprocess(inputs, tokenizer, prefix, replace(options, shard=shard))
    except ChameleonError as error:
        failure = error
    except BaseException:
        world.Abort(1)
        raise
    failed = [rank for rank, bad in enumerate(world.allgather(failure is not None)) if bad]
    # without shards, an earlier run has merged them
    if not failed and world.rank == 0 and find_shards(prefix):
        try:
            merge_shards(prefix, keep, lambda _: nullcontext(tokenizer))
        except ChameleonError as error:
            failure = error
    if failure is not None:
        raise failure
    if failed and world.rank == 0:
        what = f"{len(failed)} of {world.size} ranks failed, the first is rank {failed[0]}"
        raise DataError(prefix, what, "See its error above, then run the same command again")


def _wait_for_all(world: Any) -> None:
    """Wait until every rank has done and printed all that it has to, without keeping a core busy.

    mpiexec may end the whole job as soon as one process has left it, even with exit code 0: while
    the first rank is still merging, or before it has printed which ranks failed.
    """
    arrived = world.Ibarrier()
    while not arrived.Test():
        time.sleep(0.05)


def _world(launch: Launch) -> Any:
    """MPI's communicator of all processes, which must be as many as the launcher has started."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        what = f"{launch.world_size} processes, but mpi4py cannot be imported ({error})"
        remedy = "Install megatron-chameleon[mpi], or give each process its --shard I/N"
        raise ConfigError(launch.launcher, what, remedy) from error
    world = MPI.COMM_WORLD
    # with srun and no --mpi=pmi2, each process would write everything
    if world.size != launch.world_size:
        what = f"{launch.world_size} processes, but mpi4py sees {world.size}"
        remedy = f"Use mpiexec, or srun --mpi=pmi2. To run alone: {run_alone()}"
        raise ConfigError(launch.launcher, what, remedy)
    atexit.register(_wait_for_all, world)  # before that of mpi4py, which leaves MPI
    return world
