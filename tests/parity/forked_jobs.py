"""Run jobs of several processes each, all forked from one that has imported the libraries.

A launch by torchrun costs 12 to 16 seconds, mostly imports; this one costs as much once for all
jobs.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.launch import leave

Job = dict[str, Any]


def run_forked(run_job: Callable[[Job, Path], None]) -> None:
    """The main function of a script with the arguments JOBS.json OUTPUT_DIR.

    Args:
        run_job: Called with a job and the output folder in each of the job's ``processes``.
    """
    jobs, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        ranks = range(max(job["processes"] for job in jobs))
        children = {_fork(run_job, jobs, output, folder, rank) for rank in ranks}
        failed = False
        while children and not failed:
            child, status = os.wait()
            children.discard(child)
            failed = status != 0
        for child in children:  # they would wait for the one that failed
            os.kill(child, signal.SIGKILL)
    sys.exit(1 if failed else 0)


def _fork(
    run_job: Callable[[Job, Path], None], jobs: list[Job], output: Path, folder: str, rank: int
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _run_rank(run_job, jobs, output, folder, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # not the parent's clean-up


def _run_rank(
    run_job: Callable[[Job, Path], None], jobs: list[Job], output: Path, folder: str, rank: int
) -> None:
    """One process: the jobs that want it, each with process groups of its own."""
    platform.prepare()
    for number, job in enumerate(jobs):
        if rank >= job["processes"]:
            continue
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{number}",
            rank=rank,
            world_size=job["processes"],
        )
        run_job(job, output)
        leave()
