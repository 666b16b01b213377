"""AdamW or Muon for a config."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import _get_param_groups, get_megatron_optimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn
from torch.optim import AdamW

from megatron_chameleon.config.schema import Config
from megatron_chameleon.model.tuning.trainable import is_partly_trained
from megatron_chameleon.training.engines.muon import Muon, dimensions_of, find_matrix


def build_optimizer(config: Config, model_chunks: Sequence[nn.Module]) -> MegatronOptimizer:
    """megatron-core's optimizer for this rank's chunks, without weight decay on norms and biases.

    AdamW, or with ``optimizer.name`` muon an AdamW and a Muon in a chain.
    """
    values, chunks = config.optimizer, list(model_chunks)
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
    overrides: Any = {_no_decay(): {"wd_mult": 0.0}}
    if values.name == "adamw":
        return get_megatron_optimizer(megatron_config, chunks, config_overrides=overrides)
    named = [
        (name, parameter)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    ]
    matrices = {p: matrix for name, p in named if (matrix := find_matrix(name, p))}
    others = [p for _, p in named if p not in matrices]
    # megatron-core's functions pass over parameters that need no gradient.
    with _frozen(others):
        groups = _get_param_groups(chunks, megatron_config, overrides)
    with _frozen(matrices):
        adamw = get_megatron_optimizer(megatron_config, chunks, config_overrides=overrides)
    found = [matrices[p] for group in groups for p in group["params"]]
    if not found:  # every matrix of this rank is frozen
        return adamw
    muon: Any = Muon(groups, found, values, dimensions_of(config))
    if megatron_config.bf16:
        muon = Float16OptimizerWithFloat16Params(muon, megatron_config, None, _create_momentum)
    else:
        muon = FP32Optimizer(muon, megatron_config, _create_momentum)
    return ChainedOptimizer([muon, *adamw.chained_optimizers])


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def _create_momentum(muon: Muon, config: Any = None) -> None:
    """Give Muon the state that its first step would create, for megatron-core to load into."""
    for group in muon.param_groups:
        for parameter in group["params"]:
            muon.momentum_of(parameter)


def build_torch_adamw(config: Config, model: nn.Module) -> AdamW:
    """The same AdamW as a torch optimizer in two groups, which DeepSpeed can split and offload."""
    values, no_decay = config.optimizer, _no_decay()
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
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
    # for the group. Decay would also change the frozen rows of a matrix.
    predicate = ParamPredicate(name="vector_or_rows", fn=_is_vector_or_rows)
    return ParamKey(name=("*norm.weight", "*norm.bias"), predicate=predicate)


def _is_vector_or_rows(parameter: Tensor) -> bool:
    return parameter.dim() == 1 or is_partly_trained(parameter)
