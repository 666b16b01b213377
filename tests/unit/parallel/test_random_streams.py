"""Random streams depend on (seed, step, micro-batch, layer) and, with few exceptions, not on the
layout."""

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.random_streams import seed_layer, seed_random
from megatron_chameleon.parallel.topology import Topology

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


def draws(
    seed: int = 1, step: int = 0, micro_batch: int = 0, layer: int | None = None, **place: int
) -> tuple[list[float], list[float]]:
    """Numbers from the outer stream, and from the tensor-parallel one."""
    prepare_megatron()
    seed_random(seed, step, micro_batch, replace(HERE, **place))
    with megatron_random.get_cuda_rng_tracker().fork():
        if layer is not None:
            seed_layer(layer)
        inner = torch.rand(4).tolist()
    if layer is not None:
        seed_layer(layer)
    return torch.rand(4).tolist(), inner


def test_the_same_step_draws_the_same_again() -> None:
    assert draws(step=5) == draws(step=5)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"step": 1}, {"micro_batch": 1}, {"context_rank": 1}, {"layer": 1}]
)
def test_what_changes_both_streams(other: dict[str, int]) -> None:
    outer, inner = draws()
    other_outer, other_inner = draws(**other)
    assert outer != other_outer
    assert inner != other_inner


@pytest.mark.parametrize("other", [{"data_rank": 1}, {"pipeline_rank": 1}])
def test_what_changes_neither(other: dict[str, int]) -> None:
    assert draws(layer=3) == draws(layer=3, **other)


def test_tensor_parallel_ranks_share_the_outer_stream_only() -> None:
    outer, inner = draws(layer=3)
    other_outer, other_inner = draws(layer=3, tensor_rank=1)
    assert outer == other_outer
    assert inner != other_inner


def test_a_layers_numbers_do_not_depend_on_those_drawn_before() -> None:
    seed_random(1, 0, 0, HERE)
    torch.rand(100)
    seed_layer(1)
    torch.rand(1000)
    seed_layer(3)
    assert torch.rand(4).tolist() == draws(layer=3)[0]


def test_recomputation_finds_its_stream_again() -> None:
    """Recomputation restores the generator's state after other micro-batches have seeded it."""
    seed_random(1, 0, 0, HERE)
    state = torch.get_rng_state()
    seed_random(1, 0, 1, HERE)
    torch.set_rng_state(state)
    seed_layer(3)
    assert torch.rand(4).tolist() == draws(layer=3)[0]
