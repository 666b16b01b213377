"""The launcher that started this process is recognised by its variables."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel.launch import (
    Launch,
    describe_launch,
    find_launch,
    is_reported_by_rank_0,
    join_process_group,
    slurm_meeting_point,
)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("alone", 0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch("torchrun", 3, 8, 1)),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"},
            Launch("srun", 1, 2, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Launch("alone", 0, 1, 0)),  # the batch script
        (  # the interactive shell of salloc
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967290"},
            Launch("alone", 0, 1, 0),
        ),
        (  # the shell of `srun --pty bash`
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "1",
                "SLURM_PTY_PORT": "1",
                "SLURM_TASK_PID": "1",
            },
            Launch("alone", 0, 1, 0),
        ),
        (  # a step of one task in an allocation of two
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            Launch("srun", 0, 1, 0),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, Launch("mpich", 1, 4, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"},
            Launch("openmpi", 2, 4, 0),
        ),
    ],
)
def test_launchers(environment: dict[str, str], expected: Launch) -> None:
    assert find_launch(environment) == expected


@pytest.mark.parametrize("rank", ["x", "4", "-1"])
def test_a_rank_outside_the_job(rank: str) -> None:
    with pytest.raises(ConfigError, match=f"RANK={rank} is not a rank of a job with WORLD_SIZE=4"):
        find_launch({"RANK": rank, "WORLD_SIZE": "4"})


SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not, so this process runs alone"),
        (
            SRUN,
            "rank 0 of 2 (srun: SLURM_PROCID=0 SLURM_NTASKS=2) waits for the other rank. To run "
            "this process alone: env -u SLURM_NTASKS -u SLURM_STEP_ID chameleon ",
        ),
        (SRUN | {"SLURM_TASK_PID": str(os.getpid())}, "rank 0 of 2 (srun: SLURM_PROCID=0 SLURM"),
        ({"RANK": "1", "WORLD_SIZE": "3"}, "rank 1 of 3 (torchrun: RANK=1 WORLD_SIZE=3) waits for"),
        ({"RANK": "1", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x"}, ""),
    ],
)
def test_what_is_said_at_the_start(environment: dict[str, str], said: str) -> None:
    found = describe_launch(find_launch(environment), environment)
    assert found.startswith(said)
    assert bool(found) == bool(said)


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=f"MASTER_PORT: {port} is not a port"):
        join_process_group(Launch("torchrun", 0, 2, 0))


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_does_not_say_where_to_meet(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv(missing)
    match = f"{missing} is not set and torchrun does not set it. Export the"
    with pytest.raises(ConfigError, match=match):
        join_process_group(Launch("torchrun", 0, 2, 0))


SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[3-5]" ] && printf 'node3\\nnode4\\nnode5\\n'
"""


def test_srun_meets_on_the_first_node_at_a_port_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    variables = {"SLURM_STEP_NODELIST": "node[3-5]", "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0"}
    found = slurm_meeting_point(variables)
    assert found["MASTER_ADDR"] == "node3"
    assert found == slurm_meeting_point(variables), "all ranks compute the same"
    assert 15_000 <= int(found["MASTER_PORT"]) < 30_000
    other = slurm_meeting_point({**variables, "SLURM_STEP_ID": "1"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"], "steps of one job may run at once"


def test_srun_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    match = r"show hostnames node7` returned no node.*Export the MASTER_ADDR"
    with pytest.raises(ConfigError, match=match):
        slurm_meeting_point({"SLURM_STEP_NODELIST": "node7"})


def test_a_rank_waits_for_the_launcher_to_end_it() -> None:
    launch = Launch("srun", 1, 2, 1)
    assert not is_reported_by_rank_0(Launch("srun", 0, 2, 0), 30)
    assert is_reported_by_rank_0(Launch("mpich", 1, 2, 1), 30), "mpiexec ends when all have ended"
    # in a process of its own, where no other thread can receive the signals
    lines = (
        "import os, signal, threading",
        "from megatron_chameleon.parallel.launch import Launch, is_reported_by_rank_0",
        f"launch = {launch!r}",
        "assert not is_reported_by_rank_0(launch, 0.01)",
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()",
        "assert is_reported_by_rank_0(launch, 30)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as after an interruption",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "assert is_reported_by_rank_0(launch, 30)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


def test_joining_again_frees_the_model_of_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Refers to itself, as megatron-core's do; with its groups, it holds their threads."""

        def __init__(self) -> None:
            self.itself = self

    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    join_process_group(Launch("alone", 0, 1, 0))
    model = weakref.ref(Model())
    gc.disable()
    try:
        assert model() is not None
        join_process_group(Launch("alone", 0, 1, 0))
        assert model() is None
    finally:
        gc.enable()
