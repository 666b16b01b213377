"""How a layout is printed."""

from dataclasses import replace

import pytest

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


@pytest.mark.parametrize(
    ("world_size", "start"), [(8, "8 processes: tensor 2 x pipe"), (1, "1 process: tensor")]
)
def test_what_it_is_called(world_size: int, start: str) -> None:
    assert str(replace(HERE, world_size=world_size)).startswith(start)
