"""Start the real command in a process of its own, or in several."""

import os
import subprocess
import sys

from places import PROGRAMS, SUPPORT

TIMEOUT_SECONDS = 240


def environment(**variables: str) -> dict[str, str]:
    """One thread per process, the helpers on the path, none of the caller's launcher variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in names}
    path = os.pathsep.join(map(str, (SUPPORT, PROGRAMS)))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def command(*words: object, processes: int = 1) -> list[str]:
    """The words that start ``chameleon WORDS`` on so many processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "-m", "megatron_chameleon", *(str(word) for word in words)]


def run_chameleon(
    *words: object, processes: int = 1, succeeds: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    result = subprocess.run(
        command(*words, processes=processes),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(**variables),
    )
    if succeeds:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result
