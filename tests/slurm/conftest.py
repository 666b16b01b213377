import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster of two nodes; jobs find this Python's environment in VENV."""
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as box:
        cluster = Cluster(Path(box))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def venv() -> str:
    """The environment that the tests run in."""
    return str(Path(sys.executable).parent.parent)
