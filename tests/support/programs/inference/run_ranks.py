"""Run the jobs of ``run_cached.py`` and ``run_lockstep.py``, which say what a job is.

Usage: ``python run_ranks.py JOBS.json OUTPUT_DIR``. Besides, a job has "program", the name of the
module.
"""

from pathlib import Path
from typing import Any

import run_cached
import run_lockstep

from forked_jobs import run_forked

PROGRAMS = {"run_cached": run_cached, "run_lockstep": run_lockstep}


def run_job(job: dict[str, Any], output: Path) -> None:
    PROGRAMS[job["program"]].run_job(job, output)


if __name__ == "__main__":
    run_forked(run_job)
