"""AdamW and its learning-rate schedule for a config. Source: paper, section 2.3."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
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


class HasParamGroups(Protocol):
    """An optimizer of either engine."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def build_scheduler(config: Config, optimizer: HasParamGroups) -> OptimizerParamScheduler:
    """Linear warm-up, then the decay. The schedule advances by one per training step.

    The paper decays exponentially to 0 and gives no rate. ``exponential`` is megatron-core's curve,
    which falls from the peak at the end of the warm-up to exactly ``min_lr`` at the last step:
    ``2 * 0.5^(progress) - 1``.
    """
    values, steps = config.optimizer, config.training.steps
    exponential = values.lr_decay_style == "exponential"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=values.lr,
        min_lr=values.min_lr,
        lr_warmup_steps=values.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if exponential else values.lr_decay_style,
        wsd_decay_steps=steps - values.lr_warmup_steps if exponential else None,
        lr_wsd_decay_style="exponential" if exponential else None,
        start_wd=values.weight_decay,
        end_wd=values.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
