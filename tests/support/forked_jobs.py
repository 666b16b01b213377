"""Run jobs of several processes each, all forked from one that has imported the libraries.

A launch by torchrun takes 12 to 16 seconds, mostly for imports. Here this is paid once for all
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

from megatron_chameleon.parallel.launch import leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron

Job = dict[str, Any]


def run_forked(run_job: Callable[[Job, Path], None]) -> None:
    """The main function of a script with the arguments JOBS.json OUTPUT_DIR.

    Args:
        run_job: Called with a job and the output folder in each of the job's processes. Each job
            has its own process group.
    """
    jobs, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare_megatron()
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            _run(run_job, job, output, f"{folder}/{job['name']}")


def _run(run_job: Callable[[Job, Path], None], job: Job, output: Path, meeting: str) -> None:
    children = {_fork(run_job, job, output, meeting, rank) for rank in range(job["processes"])}
    while children:
        child, status = os.wait()
        children.discard(child)
        if status != 0:
            for other in children:  # they would wait for the failed one
                os.kill(other, signal.SIGKILL)
            sys.exit(f"{job['name']} failed")


def _fork(
    run_job: Callable[[Job, Path], None], job: Job, output: Path, meeting: str, rank: int
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=job["processes"]
        )
        run_job(job, output)
        leave_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # skips the clean-up of the parent
