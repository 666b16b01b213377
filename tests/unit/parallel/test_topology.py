"""Random streams: a function of (seed, step, place), some shared by tensor-parallel ranks."""

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology, seed_random

HERE = Topology(
    world_size=8,
    rank=0,
    tensor_rank=0,
    tensor_size=2,
    pipeline_rank=0,
    pipeline_size=2,
    data_rank=0,
    data_size=2,
)


def draws(seed: int = 1, step: int = 0, **place: int) -> tuple[list[float], list[float]]:
    """Numbers of the outer stream, and of the tensor-parallel one."""
    platform.prepare()
    seed_random(seed, step, replace(HERE, **place))
    with megatron_random.get_cuda_rng_tracker().fork():
        inner = torch.rand(4).tolist()
    return torch.rand(4).tolist(), inner


def test_the_same_step_draws_the_same_again() -> None:
    assert draws(step=5) == draws(step=5)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"step": 1}, {"data_rank": 1}, {"pipeline_rank": 1}]
)
def test_seed_step_and_place_change_both_streams(other: dict[str, int]) -> None:
    outer, inner = draws()
    other_outer, other_inner = draws(**other)
    assert outer != other_outer
    assert inner != other_inner


def test_tensor_parallel_ranks_share_the_outer_stream_only() -> None:
    outer, inner = draws()
    other_outer, other_inner = draws(tensor_rank=1)
    assert outer == other_outer
    assert inner != other_inner


@pytest.mark.parametrize(
    ("world_size", "start"), [(8, "8 processes: tensor 2 x pipe"), (1, "1 process: tensor")]
)
def test_what_it_is_called(world_size: int, start: str) -> None:
    assert str(replace(HERE, world_size=world_size)).startswith(start)
