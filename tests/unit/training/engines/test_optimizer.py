"""Which parameters have weight decay."""

from torch import nn

from megatron_chameleon.config.schema import Config
from megatron_chameleon.schedules.learning_rate import LearningRate, StepScheduler
from megatron_chameleon.training.engines.optimizer import build_torch_adamw


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
    StepScheduler(optimizer, LearningRate.of(config), config.optimizer.weight_decay)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
