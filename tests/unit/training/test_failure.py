"""Which weights are not finite, in words, and a checkpoint that holds one is refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_chameleon.errors import CheckpointError, TrainingError
from megatron_chameleon.training import failure, loop


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_checkpoint_with_a_weight_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    failure.check_loaded_weights(model.named_parameters(), Path("step_00000003"))
    with torch.no_grad():
        model[1].weight[0, 1] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        failure.check_loaded_weights(model.named_parameters(), Path("step_00000003"))
    expected = "step_00000003: not finite: 1.weight on rank 0. Use an older checkpoint."
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("loss", "grad_norm", "saves", "weight", "words"),
    [
        (1.0, 1.0, True, 0.0, None),
        (1.0, 1.0, False, math.nan, None),  # the weights are looked at before a save
        (1.0, 1.0, True, math.nan, "step 3: not finite: weight on rank 0. Resume"),
        (math.nan, math.nan, False, 0.0, "step 3: loss is nan. Resume"),
        (math.inf, math.nan, False, math.inf, "loss is inf, not finite: weight on rank 0."),
        (1.0, math.nan, True, math.nan, "step 3: grad_norm is nan. Resume"),  # all are broken
        (None, 1.0, True, 0.0, "step 3: loss is None. Resume"),
    ],
)
def test_what_stops_a_run(
    loss: float | None, grad_norm: float, saves: bool, weight: float, words: str | None
) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    metrics, engine = (
        {"loss": loss, "grad_norm": grad_norm},
        SimpleNamespace(named_parameters=model.named_parameters),
    )
    if words is None:
        loop._check_finite(3, metrics, engine, saves=saves)
        return
    with pytest.raises(TrainingError) as caught:
        loop._check_finite(3, metrics, engine, saves=saves)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("everywhere", "words"),
    [
        ([[], []], ""),
        ([[], ["a"]], "a on rank 1"),
        ([["a", "b"], ["a"]], "a on rank 0, a on rank 1 and 1 more"),
        ([["a"]] * 8, "a on rank 0, a on rank 1, a on rank 2, a on rank 3 and 4 more"),
    ],
)
def test_the_words_stay_in_a_line(everywhere: list[list[str]], words: str) -> None:
    assert failure._describe(everywhere) == words
