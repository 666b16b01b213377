"""Find out how this process was launched and join the job's process group.

torchrun (and the deepspeed launcher) set RANK and WORLD_SIZE, srun sets SLURM_PROCID, mpiexec its
own names; a process that finds none of them is a job of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_chameleon.errors import ConfigError

# launcher -> the variables that hold its rank, its world size and its rank within the node
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class Launch:
    """The place of this process in its job."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def find_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables; the first launcher whose rank and world size are set wins.

    Raises:
        ConfigError: A variable is not a number, or the rank does not lie within the world size.
    """
    env = os.environ if environment is None else environment
    for launcher, (rank_name, size_name, local_name) in _LAUNCHERS.items():
        if rank_name not in env or size_name not in env:
            continue
        if launcher == "srun" and "SLURM_STEP_ID" not in env:
            continue  # the batch script itself, outside srun
        values = [env[rank_name], env[size_name], env.get(local_name, "0")]
        if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
            what = f"{rank_name}={values[0]} and {size_name}={values[1]} name no place in a job"
            raise ConfigError(launcher, what, "Unset them, or start through torchrun")
        return Launch(launcher, *(int(value) for value in values))
    return Launch("alone", 0, 1, 0)


def leave() -> None:
    """Take the job's process groups down; without it, a process may abort while it exits."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(launch: Launch) -> None:
    """Initialise torch.distributed for this process, with NCCL on GPUs and gloo on CPUs.

    Raises:
        ConfigError: The address of the first process is not known.
    """
    import torch

    from megatron_chameleon.parallel import platform

    if platform.has_gpu():
        torch.cuda.set_device(launch.local_rank)
    store = None
    if launch.launcher == "alone":
        store = torch.distributed.HashStore()  # one process meets itself without a port
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                what = f"{name} is not set and {launch.launcher} does not set it"
                raise ConfigError("launch", what, f"Export {name} of the first node")
    torch.distributed.init_process_group(
        platform.backend(), store=store, rank=launch.rank, world_size=launch.world_size
    )
