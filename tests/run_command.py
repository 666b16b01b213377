"""Start the real command in a process of its own, or in several."""

import os
import subprocess
import sys

TIMEOUT_SECONDS = 240


def environment(**variables: str) -> dict[str, str]:
    """One thread a process, and no launcher's variables of whoever runs the tests."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


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
