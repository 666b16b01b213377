"""The scripts in slurm/ on a real SLURM end like an unbroken run after signals and a dead node.

The jobs of one test run at once, since most of their time goes into starting Python.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from places import REPOSITORY
from slurm_cluster import Cluster

SETTINGS = ("training.steps=40", "checkpoint.every_steps=3", "model.hidden_dropout=0.1")
EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm", "learning_rate")
SMALL = ("--cpus-per-task=1", "--gpus-per-node=1", "--mem=2000")
SECONDS = 240


@pytest.fixture(scope="module")
def submit(slurm: Cluster, venv: str, tiny) -> Callable[..., str]:
    """Submit a script of slurm/ whose run goes to FOLDER/run; returns the number of the job."""

    def start(run: str, layout: tuple[str, ...], *overrides: str) -> str:
        words = (*SMALL, *layout, f"--output={tiny.folder}/{run}.log", "slurm/pretrain_7b.sbatch")
        run_dir = f"logging.run_dir={tiny.folder / run}"
        variables = {"VENV": venv, "CONFIG": str(tiny.config), "LOGS": f"{tiny.folder}/{run}-logs"}
        return slurm.submit(REPOSITORY, *words, run_dir, *SETTINGS, *overrides, **variables)

    return start


@pytest.fixture(scope="module")
def unbroken(tiny) -> list[dict[str, Any]]:
    tiny.train("slurm-unbroken", *SETTINGS, "checkpoint.keep_last=99", processes=2)
    return tiny.metrics("slurm-unbroken")


def exact(metrics: list[dict[str, Any]]) -> list[list[Any]]:
    return [[record[key] for key in EXACT] for record in metrics]


def wait_for_step(slurm: Cluster, tiny, run: str, step: int) -> None:
    path = tiny.folder / run / "metrics.jsonl"
    slurm.wait_for(lambda: path.exists() and path.read_text().count("\n") >= step, SECONDS)


def test_signals_and_a_preemption_save_and_requeue_over_two_nodes(
    slurm, submit, tiny, unbroken
) -> None:
    job = submit("signals", ("--nodes=2", "--ntasks-per-node=1"))
    wait_for_step(slurm, tiny, "signals", 4)
    slurm.run("scancel", "--signal=USR1", job)  # --signal=USR1@300 does this before the time limit
    log = tiny.folder / "signals.log"
    slurm.wait_for(lambda: "restart 1, on node[1-2]" in log.read_text(), SECONDS)
    first = len(tiny.metrics("signals"))
    wait_for_step(slurm, tiny, "signals", first + 4)
    urgent = (
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        f"--output={tiny.folder}/urgent.log",
    )
    slurm.submit(REPOSITORY, *urgent, "--wrap=hostname")  # SIGTERM with 60 seconds of grace
    assert slurm.wait_until_ended(job, SECONDS) == "COMPLETED", log.read_text()
    assert exact(tiny.metrics("signals")) == exact(unbroken)
    text = log.read_text()
    assert text.count("ended with exit code 75") == 2 and "restart 3" not in text
    assert (tiny.folder / "urgent.log").read_text() == "node1\n"
    assert text.count("ended with exit code 0") == 1
    assert "command: srun chameleon train" in text
    rank0 = (tiny.folder / "signals-logs" / f"chameleon-7b-{job}-rank0.log").read_text()
    assert f"SIGUSR1: stopped after step {first}; the same command resumes the run" in rank0
    assert f"starts at step {first}" in rank0
    assert "SIGTERM: stopped after step" in rank0


def test_a_job_comes_back_on_the_other_node(slurm, submit, tiny, unbroken) -> None:
    job = submit("node", ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"))
    wait_for_step(slurm, tiny, "node", 7)
    log = tiny.folder / "node.log"
    first = "node1" if "restart 0, on node1" in log.read_text() else "node2"
    slurm.kill_node(first)
    try:
        assert slurm.wait_until_ended(job, SECONDS) == "COMPLETED", log.read_text()
    finally:
        slurm.start_node(first)
    assert exact(tiny.metrics("node")) == exact(unbroken)
    other = {"node1": "node2", "node2": "node1"}[first]
    assert f"restart 1, on {other}" in log.read_text()


def test_a_mistake_is_not_repeated(slurm, submit, tiny) -> None:
    endless = "training.steps=100000"
    first = submit("first", ("--nodes=1", "--ntasks-per-node=1"), endless)
    job = submit("mistake", ("--nodes=1", "--ntasks-per-node=2"), "optimizer.lr=0")
    wait_for_step(slurm, tiny, "first", 1)
    taken = f"logging.run_dir={tiny.folder / 'first'}"
    second = submit("second", ("--nodes=1", "--ntasks-per-node=2"), taken, endless)
    slurm.wait_until_ended(second, SECONDS)
    assert slurm.state(second) == "FAILED" and slurm.state(first) == "RUNNING"
    slurm.run("scancel", first)
    slurm.wait_until_ended(first, SECONDS)
    rank0 = (tiny.folder / "second-logs" / f"chameleon-7b-{second}-rank0.log").read_text()
    said = [line for line in rank0.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f", SLURM job {first}, since" in said[0]
    assert (tiny.folder / "second.log").read_text().count("ended with exit code 2\n") == 1

    assert slurm.wait_until_ended(job, SECONDS) == "FAILED"
    text = (tiny.folder / "mistake.log").read_text()
    assert text.count("ended with exit code 2") == 1
    rank0 = (tiny.folder / "mistake-logs" / f"chameleon-7b-{job}-rank0.log").read_text()
    assert "error: optimizer.lr: 0.0 is not above 0" in rank0


def test_a_process_that_dies_takes_the_job_back_into_the_queue(
    slurm, submit, tiny, unbroken
) -> None:
    """Its command goes back to an earlier checkpoint, and the requeued one goes on."""
    shutil.copytree(tiny.folder / "slurm-unbroken", tiny.folder / "dies")
    checkpoints = tiny.folder / "dies" / "checkpoints"
    path = str(checkpoints / "step_00000006")
    job = submit("dies", ("--nodes=1", "--ntasks-per-node=2"), "--resume", path)
    slurm.wait_for(lambda: (checkpoints / "branch_0001" / "step_00000009").exists(), SECONDS)
    slurm.wait_for(lambda: (checkpoints / "step_00000009").exists(), SECONDS)
    slurm.kill_task(job, rank=1)
    assert slurm.wait_until_ended(job, SECONDS) == "COMPLETED"
    assert exact(tiny.metrics("dies")) == exact(unbroken)
    text = (tiny.folder / "dies.log").read_text()
    assert "restart 1, on" in text
    assert "ended with exit code 75" not in text
    rank0 = (tiny.folder / "dies-logs" / f"chameleon-7b-{job}-rank0.log").read_text()
    assert rank0.count("the run goes back to step_00000006") == 1
    assert f"the run began from {path} on" in rank0
    names = sorted(path.name for path in (checkpoints / "branch_0001").glob("step_*"))
    assert (names[0], names[-1]) == ("step_00000009", "step_00000040")
