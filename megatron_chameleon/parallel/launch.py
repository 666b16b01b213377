"""Find out how this process was launched and join the job's process group.

torchrun and the deepspeed launcher set RANK and WORLD_SIZE, srun sets SLURM_PROCID, and mpiexec has
its own names. A process that finds none of them is a job of its own.

MASTER_ADDR and MASTER_PORT say where the processes meet. torchrun sets them. Under srun they are
derived from SLURM's variables, and under mpiexec rank 0 sends them to the others through MPI.
Values that you set yourself win.
"""

import gc
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.masking import mask_secrets

# launcher -> the variables that hold its rank, its world size and its rank within the node
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers from here on the steps that no ``srun PROGRAM`` started: the batch script, the
interactive shell of ``salloc``, external processes."""

_FIRST_PORT, _PORTS = 15_000, 15_000  # below the range that systems assign from


_JOINED: set[int] = set()
"""The id of this process once it has joined a group; a fork has another id, and no group."""


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
        if launcher == "srun" and not _is_srun_task(env):
            continue
        if launcher == "srun" and env.get("SLURM_STEP_NUM_TASKS"):
            size_name = "SLURM_STEP_NUM_TASKS"  # the step's; SLURM_NTASKS may be the allocation's
        values = [env[rank_name], env[size_name], env.get(local_name, "0")]
        if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
            what = f"{rank_name}={values[0]} is not a rank of a job with {size_name}={values[1]}"
            raise ConfigError(launcher, what, f"Start with {launcher}, or alone: {run_alone(env)}")
        return Launch(launcher, *(int(value) for value in values))
    return Launch("alone", 0, 1, 0)


def _is_srun_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, and not somebody in a shell of an allocation."""
    step = env.get("SLURM_STEP_ID", "")
    if not step or (step.isdigit() and int(step) >= _FIRST_SPECIAL_STEP):
        return False
    # in the shell of `srun --pty bash`, the shell is the step's only process
    return "SLURM_PTY_PORT" not in env or env.get("SLURM_TASK_PID") == str(os.getpid())


def _is_started(launcher: str, env: Mapping[str, str]) -> bool:
    """Whether a running launcher has started this process or its parent, as far as can be seen."""
    if launcher == "torchrun":
        return "TORCHELASTIC_RUN_ID" in env
    if launcher == "srun":
        return env.get("SLURM_TASK_PID") in (str(os.getpid()), str(os.getppid()))
    return any(name in env for name in ("PMI_FD", "PMI_PORT", "PMIX_RANK", "PMIX_NAMESPACE"))


def run_alone(environment: Mapping[str, str] | None = None) -> str:
    """The command of this process without the launchers' variables.

    >>> run_alone({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}).split(" chameleon")[0]
    'env -u SLURM_NTASKS -u SLURM_STEP_ID'
    """
    env = os.environ if environment is None else environment
    names = [size for rank, size, _ in _LAUNCHERS.values() if rank in env or size in env]
    if "SLURM_NTASKS" in names:
        names.append("SLURM_STEP_ID")
    words = mask_secrets(shlex.join(sys.argv[1:3]))
    return f"env {' '.join(f'-u {name}' for name in names)} chameleon {words} ..."


def describe_launch(launch: Launch, environment: Mapping[str, str] | None = None) -> str:
    """What to say at the start: the place of this process, and which variables say so.

    Variables that were left over, for example in a shell inside an allocation, make a process wait
    for others that nobody starts. Where the launcher may be gone, every rank speaks, and says how
    to run alone; otherwise rank 0 speaks for all.
    """
    env = os.environ if environment is None else environment
    if launch.launcher == "alone":
        size = env.get("WORLD_SIZE", "1")
        missing = f"WORLD_SIZE={size} is set and RANK is not, so this process runs alone"
        return "" if size == "1" else missing
    is_started = _is_started(launch.launcher, env)
    if is_started and launch.rank > 0:
        return ""
    names = [name for name in _LAUNCHERS[launch.launcher][:2] if name in env]
    variables = " ".join(f"{name}={env[name]}" for name in names)
    place = f"rank {launch.rank} of {launch.world_size} ({launch.launcher}: {variables})"
    if is_started or launch.world_size == 1:
        return place
    others = "the other rank" if launch.world_size == 2 else "the other ranks"
    return f"{place} waits for {others}. To run this process alone: {run_alone(env)}"


def leave_process_group() -> None:
    """Destroy the job's process groups. Otherwise a process may abort while it exits.

    The process can join again, with all other ranks.
    """
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


def join_process_group(
    launch: Launch,
    stop_signal: Callable[[], str | None] = lambda: None,
    limit_seconds: float | None = None,
) -> None:
    """Initialise torch.distributed for this process: NCCL on GPUs, gloo on CPUs.

    Args:
        launch: The place of this process.
        stop_signal: Returns the name of a signal that asks this process to stop, or None.
        limit_seconds: How long a collective may wait for the other ranks; None: PyTorch's limit.

    Raises:
        ConfigError: The address of the first process is unknown, or not all processes have come.
        StoppedWaiting: A signal came while this process waited for the others.
    """
    import torch

    from megatron_chameleon.parallel import platform
    from megatron_chameleon.parallel.meeting import Meeting

    if platform.has_gpu():
        torch.cuda.set_device(launch.local_rank)
    if os.getpid() in _JOINED:
        # The model of an earlier run refers to itself, and keeps its groups with dozens of threads.
        # Here, because nearly every process joins once, and a collection takes a quarter second.
        gc.collect()
    _JOINED.add(os.getpid())
    store: torch.distributed.Store | None = None
    if launch.launcher == "alone":
        store = torch.distributed.HashStore()  # a single process needs no port
    else:
        address, port = _meeting_point(launch)
        meeting = Meeting(
            launch.rank, launch.world_size, launch.local_rank == 0, run_alone(), stop_signal
        )
        store = meeting.wait(address, port)
    torch.distributed.init_process_group(
        platform.distributed_backend(),
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=None if limit_seconds is None else timedelta(seconds=limit_seconds),
    )


def _meeting_point(launch: Launch) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, which are set here unless they are set already."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    found: dict[str, str] = {}
    if missing and launch.launcher == "srun":
        found = slurm_meeting_point(os.environ)
    elif missing and launch.launcher in ("openmpi", "mpich"):
        found = _mpi_meeting_point(launch)
    for name in missing:
        if name not in found:
            what = f"{name} is not set and {launch.launcher} does not set it"
            remedy = f"Export the {name} of the first node. To run alone: {run_alone()}"
            raise ConfigError("launch", what, remedy)
        os.environ[name] = found[name]
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError("MASTER_PORT", f"{port[:40]} is not a port", "Use a number up to 65535")
    return address, int(port)


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
        remedy += f". To run alone: {run_alone(environment)}"
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
        remedy += f". To run alone: {run_alone()}"
        raise ConfigError(launch.launcher, what, remedy)
    found: dict[str, object] = {}
    if launch.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            found = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": probe.getsockname()[1]}
    found = world.bcast(found)
    return {name: str(value) for name, value in found.items()}
