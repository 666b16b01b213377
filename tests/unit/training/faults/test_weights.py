"""Weights that are not finite are named, and a checkpoint that holds one is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.training.faults import weights


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_checkpoint_with_a_weight_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights.check_loaded_weights(model.named_parameters(), Path("step_00000003"))
    with torch.no_grad():
        model[1].weight[0, 1] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        weights.check_loaded_weights(model.named_parameters(), Path("step_00000003"))
    expected = "step_00000003: not finite: 1.weight on rank 0. Use an older checkpoint."
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("everywhere", "words"),
    [
        ([[], []], ""),
        ([[], ["a"]], "a on rank 1"),
        ([["a", "b"], ["a"]], "a on rank 0, a on rank 1 and 1 more"),
        ([["a"]] * 8, "a on rank 0, a on rank 1, a on rank 2, a on rank 3 and 4 more"),
    ],
)
def test_the_summary_stays_short(everywhere: list[list[str]], words: str) -> None:
    assert weights.summarize_names(everywhere) == words
