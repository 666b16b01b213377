"""The learning-rate schedules, and which parameters have weight decay."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from torch import nn

from megatron_chameleon.config.schema import Config
from megatron_chameleon.training.engines.optimizer import build_scheduler, build_torch_adamw


def rates(style: str, steps: int = 10, warmup: int = 2) -> list[float]:
    config = Config()
    config.training.steps = steps
    config.optimizer.lr = 1.0
    config.optimizer.lr_warmup_steps = warmup
    config.optimizer.lr_decay_style = style
    group: dict[str, float] = {}
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]))
    found = []
    for _ in range(steps):
        found.append(group["lr"])
        scheduler.step(1)
    return [*found, group["lr"]]


@pytest.mark.parametrize("style", ["exponential", "cosine", "constant"])
def test_linear_warm_up_to_the_peak(style: str) -> None:
    assert rates(style)[:3] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("style", ["exponential", "cosine"])
def test_the_decay_falls_all_the_way_to_zero(style: str) -> None:
    found = rates(style)[2:]
    assert all(later < earlier for earlier, later in pairwise(found))
    assert found[-1] == 0.0


def test_the_exponential_decay_loses_a_constant_share() -> None:
    # 2 * 0.5^p - 1, with p the progress after the warm-up: lr + 1 halves over the decay
    found = [rate + 1 for rate in rates("exponential")[2:]]
    shares = [b / a for a, b in pairwise(found)]
    assert shares == pytest.approx([0.5 ** (1 / 8)] * 8, rel=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant")[2:] == [1.0] * 9


def test_deepspeed_gets_two_groups_by_the_same_rule() -> None:
    model = nn.Module()
    model.linear_proj = nn.Linear(4, 4)
    model.q_layernorm = nn.Linear(4, 2)  # a matrix, like the weights of the QK-norms
    config = Config()
    config.optimizer.weight_decay = 0.25
    optimizer = build_torch_adamw(config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert found == [
        ["linear_proj.weight"],
        ["linear_proj.bias", "q_layernorm.weight", "q_layernorm.bias"],
    ]
    build_scheduler(config, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
