"""What several tests need: the real command, and a tiny project to run it on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from run_command import run_chameleon
from tiny_project import TinyProject, make_tiny_project

if not torch.cuda.is_available():  # before anything imports Triton, which reads it only then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one file on one worker, for they share what is expensive to make.

    All of tests/slurm is one group: there is one cluster.
    """
    for item in items:
        group = "slurm" if "slurm" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def chameleon() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_chameleon


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    """Process groups of this process alone, for models that are built in a test."""
    from megatron_chameleon.config.schema import ParallelConfig
    from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
    from megatron_chameleon.parallel.megatron_setup import prepare_megatron
    from megatron_chameleon.parallel.topology import create_topology

    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    yield create_topology(ParallelConfig())
    leave_process_group()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_tiny_project(tmp_path_factory.mktemp("tiny"))
