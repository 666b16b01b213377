"""What several tests need: the real command, and a tiny project to run it on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from run_command import run_chameleon
from tiny_project import TinyProject, copy_tiny_project, make_tiny_project

collect_ignore = ["with_vllm"]  # `make test-vllm`, which does not read this file

if not torch.cuda.is_available():  # before anything imports Triton, which reads it only then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of one file on one worker, for they share what is expensive to make.

    All of tests/slurm counts as one file: there is one cluster. Files start in the order of their
    names, so that the long ones, which are not unit tests, come first.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


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
def made_tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_tiny_project(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def tiny(made_tiny: TinyProject, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """The tiny project, in a folder of this test file's own."""
    return copy_tiny_project(made_tiny, tmp_path_factory.mktemp("tiny"))
