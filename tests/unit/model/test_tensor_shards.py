"""Which rows and columns of a whole tensor a tensor-parallel rank holds."""

import pytest
import torch

from megatron_chameleon.model.tensor_shards import join_shards, take_shard

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


def test_a_rank_holds_its_gate_rows_and_its_up_rows() -> None:
    whole = torch.arange(8).view(8, 1)  # gate rows 0 to 3, up rows 4 to 7
    found = [take_shard(whole, FC1, 0, rank, 2).flatten().tolist() for rank in range(2)]
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("name", "dim"), [(FC1, 0), ("linear_fc2.weight", 1), ("qkv.weight", 0)])
def test_joined_shards_are_the_whole(name: str, dim: int) -> None:
    whole = torch.arange(96).view(8, 12)
    shards = [take_shard(whole, name, dim, rank, 4) for rank in range(4)]
    assert torch.equal(join_shards(shards, name, dim), whole)
