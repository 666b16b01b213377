"""Find out how this process was launched and join the job's process group.

torchrun and the deepspeed launcher set RANK and WORLD_SIZE, srun sets SLURM_PROCID, and mpiexec has
its own names. A process that finds none of them is a job of its own.

MASTER_ADDR and MASTER_PORT say where the processes meet. torchrun sets them. Under srun they are
derived from SLURM's variables, and under mpiexec rank 0 sends them to the others through MPI.
Values that you set yourself win.
"""

import os
import signal
import socket
import subprocess
import time
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

_FIRST_PORT, _PORTS = 15_000, 15_000  # below the range that systems assign from


@dataclass(frozen=True)
class Launch:
    """The place of this process in its job."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def find_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables. The first launcher whose rank and world size are set wins.

    Raises:
        ConfigError: A variable is not a number, or the rank is outside the world size.
    """
    env = os.environ if environment is None else environment
    for launcher, (rank_name, size_name, local_name) in _LAUNCHERS.items():
        if rank_name not in env or size_name not in env:
            continue
        if launcher == "srun" and "SLURM_STEP_ID" not in env:
            continue  # the batch script itself, not under srun
        values = [env[rank_name], env[size_name], env.get(local_name, "0")]
        if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
            what = f"{rank_name}={values[0]} is not a rank of a job with {size_name}={values[1]}"
            raise ConfigError(launcher, what, "Unset them, or start with torchrun")
        return Launch(launcher, *(int(value) for value in values))
    return Launch("alone", 0, 1, 0)


def leave_process_group() -> None:
    """Destroy the job's process groups. Otherwise a process may abort while it exits."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_reported_by_rank_0(launch: Launch, seconds: float = 10.0) -> bool:
    """Whether this rank may exit without printing the error that it has found.

    Usually all ranks find the same error, and rank 0 prints it. But rank 0 may be slower than this
    rank, and launchers end all ranks when one has ended. So this rank first waits until it is ended
    itself. If that does not happen, the error is this rank's own, such as a file that is missing on
    its node. mpiexec waits for all ranks, so there is nothing to wait for.

    Args:
        launch: The place of this process.
        seconds: How long to wait.
    """
    if launch.rank == 0 or launch.launcher in ("openmpi", "mpich"):
        return launch.rank != 0
    received: list[int] = []
    signals = (signal.SIGTERM, signal.SIGUSR1)
    for number in signals:
        signal.signal(number, lambda caught, _: received.append(caught))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    deadline = time.monotonic() + seconds
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(received)


def join_process_group(launch: Launch) -> None:
    """Initialise torch.distributed for this process: NCCL on GPUs, gloo on CPUs.

    Raises:
        ConfigError: The address of the first process is unknown.
    """
    import torch

    from megatron_chameleon.parallel import platform

    if platform.has_gpu():
        torch.cuda.set_device(launch.local_rank)
    store = None
    if launch.launcher == "alone":
        store = torch.distributed.HashStore()  # a single process needs no port
    else:
        _set_meeting_point(launch)
    torch.distributed.init_process_group(
        platform.distributed_backend(), store=store, rank=launch.rank, world_size=launch.world_size
    )


def _set_meeting_point(launch: Launch) -> None:
    """Set MASTER_ADDR and MASTER_PORT unless they are set already."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not missing:
        return
    found: dict[str, str] = {}
    if launch.launcher == "srun":
        found = slurm_meeting_point(os.environ)
    elif launch.launcher in ("openmpi", "mpich"):
        found = _mpi_meeting_point(launch)
    for name in missing:
        if name not in found:
            what = f"{name} is not set and {launch.launcher} does not set it"
            raise ConfigError("launch", what, f"Export the {name} of the first node")
        os.environ[name] = found[name]


def slurm_meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """The first node of a job step, and a port computed from the job's and the step's number.

    With SLURM's default ``--distribution``, rank 0 runs on the first node.

    Returns:
        Values for MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: ``scontrol``, which expands lists such as ``node[3-5,9]``, failed.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        first = answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        what = f"`{' '.join(command)}` returned no node ({error})"
        remedy = "Export the MASTER_ADDR and MASTER_PORT of the first node"
        raise ConfigError("SLURM_STEP_NODELIST", what, remedy) from error
    numbers = [environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    job, step = (int(number) if number.isdigit() else 0 for number in numbers)
    port = _FIRST_PORT + (job * 7 + step) % _PORTS
    return {"MASTER_ADDR": first, "MASTER_PORT": str(port)}


def _mpi_meeting_point(launch: Launch) -> dict[str, str]:
    """Rank 0's host name and a free port on its machine, broadcast by MPI.

    Raises:
        ConfigError: mpi4py is missing, or it was built with a different MPI from the launcher's, so
            that each process believes it is alone.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        what = f"MASTER_ADDR is not set, and mpi4py cannot be used ({error})"
        remedy = "pip install 'megatron_chameleon[mpi]', or export MASTER_ADDR and MASTER_PORT"
        raise ConfigError(launch.launcher, what, remedy) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        what = f"mpi4py sees rank {world.Get_rank()} of {world.Get_size()}, but the launcher "
        what += f"says {launch.rank} of {launch.world_size}"
        remedy = "Use the mpiexec of the MPI that mpi4py was built with"
        raise ConfigError(launch.launcher, what, remedy)
    found: dict[str, object] = {}
    if launch.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            found = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": probe.getsockname()[1]}
    found = world.bcast(found)
    return {name: str(value) for name, value in found.items()}
