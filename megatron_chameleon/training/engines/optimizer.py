"""AdamW for a config. Source: paper, section 2.3."""

import math
from collections.abc import Sequence

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import nn
from torch.optim import AdamW

from megatron_chameleon.config.schema import Config


def build_optimizer(config: Config, model_chunks: Sequence[nn.Module]) -> MegatronOptimizer:
    """megatron-core's AdamW for this rank's chunks, without weight decay on norms and biases."""
    values = config.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=values.lr,
        min_lr=values.min_lr,
        weight_decay=values.weight_decay,
        adam_beta1=values.adam_beta1,
        adam_beta2=values.adam_beta2,
        adam_eps=values.adam_eps,
        clip_grad=values.clip_grad or math.inf,  # with 0, megatron-core does not compute the norm
        bf16=config.training.dtype == "bf16",
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    return get_megatron_optimizer(
        megatron_config, list(model_chunks), config_overrides={_no_decay(): {"wd_mult": 0.0}}
    )


def build_torch_adamw(config: Config, model: nn.Module) -> AdamW:
    """The same AdamW as a torch optimizer in two groups, which DeepSpeed can split and offload."""
    values, no_decay = config.optimizer, _no_decay()
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        parts[no_decay.matches(parameter, name)].append(parameter)
    groups = [
        {"params": parameters, "wd_mult": wd_mult}
        for parameters, wd_mult in zip(parts, (1.0, 0.0), strict=True)
        if parameters
    ]
    return AdamW(
        groups,
        lr=values.lr,
        betas=(values.adam_beta1, values.adam_beta2),
        eps=values.adam_eps,
        weight_decay=values.weight_decay,
        fused=True,  # one pass over the memory, also on CPUs, where an offloaded update runs
    )


def _no_decay() -> ParamKey:
    # megatron-core's own rule finds vectors only, and the weights of the QK-norms have a dimension
    # for the group.
    vectors = ParamPredicate(name="vector", fn=lambda parameter: parameter.dim() == 1)
    return ParamKey(name=("*norm.weight", "*norm.bias"), predicate=vectors)
