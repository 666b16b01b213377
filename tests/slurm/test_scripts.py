"""Each script in slurm/ is valid bash and short, and SLURM accepts its options."""

import re
import subprocess
from pathlib import Path

import pytest

from places import REPOSITORY
from slurm_cluster import Cluster

SCRIPTS = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("name", [*SCRIPTS, "common.sh"])
def test_it_is_bash_and_fits_on_a_screen(name: str) -> None:
    path = REPOSITORY / "slurm" / name
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = path.read_text().splitlines()
    assert 20 <= len(lines) <= (80 if name == "common.sh" else 60)
    assert max(map(len, lines)) <= 140
    if name != "common.sh":
        assert lines[0] == "#!/bin/bash"
        assert {"set -euo pipefail", "source slurm/common.sh"} <= set(lines)


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_accepts_every_option(slurm: Cluster, name: str) -> None:
    """The sizes of a cluster of two small nodes override those of the script."""
    nodes = 1 if "#SBATCH --nodes=8" not in (REPOSITORY / "slurm" / name).read_text() else 2
    words = (f"--nodes={nodes}", "--cpus-per-task=1", "--mem=2000", f"slurm/{name}")
    said = slurm.test(REPOSITORY, *words)
    assert re.search(r"to start at .* using \d+ processors on nodes node", said), said


def test_a_script_without_arguments_says_so(slurm: Cluster, venv: str, tmp_path: Path) -> None:
    small = ("--cpus-per-task=1", "--mem=2000")
    jobs = {
        name: slurm.submit(
            REPOSITORY, *small, f"--output={tmp_path}/{name}", *array, f"slurm/{name}"
        )
        for name, array in {"convert.sbatch": (), "preprocess_array.sbatch": ("--array=0",)}.items()
    }
    for name, job in jobs.items():
        assert slurm.wait_until_ended(job, 60) == "FAILED"
        text = (tmp_path / name).read_text()
        assert "error: " in text and " Pass the arguments of chameleon " in text
