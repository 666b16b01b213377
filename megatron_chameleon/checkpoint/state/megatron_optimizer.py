"""Save megatron-core's optimizers in the one form that every engine and layout can load.

Megatron-core has an optimizer for fp32, one for bf16 and a distributed one. Each saves its state in
its own form: under different names, with or without main weights, and with learning rates and steps
beside the tensors. Here only the tensors are kept, under the names that
``checkpoint/state/reader.py`` lists.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_chameleon.checkpoint.names.optimizer_state import (
    AVERAGE,
    MAIN_WEIGHT,
    MOMENTS,
    MOMENTUM,
    optimizer_key,
)
from megatron_chameleon.checkpoint.names.partial_state import (
    clear_frozen_rows,
    to_load,
    to_store,
    weight_of,
    weight_to_load,
)
from megatron_chameleon.checkpoint.state.distributed_optimizer import load_ranges, sharded_ranges
from megatron_chameleon.checkpoint.state.torch_dist import load_sharded

_MAIN_WEIGHT = optimizer_key(MAIN_WEIGHT, "")


def sharded_optimizer(
    optimizer: MegatronOptimizer,
    model: dict[str, Any],
    metadata: dict[str, Any],
    split: Collection[str] = (),
) -> dict[str, Any]:
    """The optimizer's tensors that are to be saved. A collective.

    Args:
        optimizer: The optimizer, after at least one step.
        model: The model's sharded state, with the parameters themselves in it.
        metadata: Megatron-core's settings for sharded state.
        split: The stacked weights of which only some layers are trained.
    """
    if distributed := _distributed(optimizer):
        return sharded_ranges(distributed, list(sharded_values(model)), split)
    state = {
        str(number): member.sharded_state_dict(model, False, metadata=metadata)
        for number, member in enumerate(_members(optimizer))
    }
    tensors, _ = extract_sharded_tensors_and_factories(state)
    dtypes = {sharded.key: sharded.data.dtype for sharded in sharded_values(model)}
    kept = {}
    for index, sharded in enumerate(sharded_values(tensors)):
        name = sharded.key.removeprefix(_MAIN_WEIGHT)
        if dtypes.get(name) != torch.float32:  # an fp32 weight is its own main weight
            kept[str(index)] = to_store(sharded, split)
    return kept


def load_optimizer(
    optimizer: MegatronOptimizer,
    model: dict[str, Any],
    metadata: dict[str, Any],
    checkpoint: Path,
    stored: Collection[str],
    step: int,
    *,
    average: bool = False,
    split: Collection[str] = (),
) -> None:
    """Load main weights, moments and the step. A collective.

    The optimizer keeps its own learning rate, betas and similar settings. Moments that the
    checkpoint lacks, because the weights were frozen so far, are zeros. So are the moments of
    frozen rows.

    Args:
        optimizer: The optimizer, before its first step.
        model: The model's sharded state, with the parameters themselves in it.
        metadata: As for ``sharded_optimizer``.
        checkpoint: A whole checkpoint of any engine and layout.
        stored: All names in the checkpoint.
        step: Number of updates before the checkpoint.
        average: Whether to load the moving average of the weights too.
        split: The stacked weights of which only some layers are trained, here or so far.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    if distributed := _distributed(optimizer):
        load_ranges(
            distributed, list(sharded_values(model)), checkpoint, stored, step, average=average
        )
        return
    if average:
        _create_averages(optimizer)
    members = dict(enumerate(_members(optimizer)))
    # Each by itself: megatron-core's chain would put its number before the names.
    state = {
        str(number): member.sharded_state_dict(model, True, metadata=metadata)
        for number, member in members.items()
    }
    dict_list_map_inplace(partial(_place, stored, split), state)
    loaded = load_sharded(checkpoint, state, is_whole=False)
    for number, member in members.items():
        _set_step(loaded[str(number)], step, member)
        member.load_state_dict(loaded[str(number)])
    for parameter, moments in _moments(members.values()):
        for moment in moments:
            clear_frozen_rows(parameter, moment)


def _create_averages(optimizer: MegatronOptimizer) -> None:
    """Make room for the moving average beside the moments, so that it is loaded with them."""
    for member in _members(optimizer):
        member.init_state_fn(member.optimizer, member.config)  # only creates what does not exist
        for group in member.optimizer.param_groups:
            for weight in group["params"]:
                member.optimizer.state[weight][AVERAGE] = torch.empty_like(weight)


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers of this rank; empty if it uses another kind of optimizer."""
    return [inner for inner in _members(optimizer) if isinstance(inner, DistributedOptimizer)]


def _members(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that megatron-core has chained, or the only one."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if _has_state(member)]


def _has_state(member: Any) -> bool:
    """Whether an optimizer has parameters, which it lacks on a rank where everything is frozen.

    megatron-core has a stub there, or groups without parameters if other ranks have some.
    """
    if getattr(member, "is_stub_optimizer", False):
        return False
    return any(group["params"] for group in member.optimizer.param_groups)


def sharded_values(state: dict[str, Any]) -> Iterator[Any]:
    """The sharded tensors in nested dicts and lists."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def _place(stored: Collection[str], split: Collection[str], value: Any) -> Any:
    """Tell megatron-core under which name to read a value, or to keep it as it is."""
    if isinstance(value, LocalNonpersistentObject):
        return value
    if not isinstance(value, ShardedTensor | ShardedTensorFactory):
        return LocalNonpersistentObject(value)
    if value.key.startswith(_MAIN_WEIGHT):
        weight = replace(value, key=weight_of(value.key))
        return weight_to_load(weight, torch.float32, stored, split)
    found = to_load(value, stored, split)
    return LocalNonpersistentObject(value.data.zero_()) if found is None else found


def _moments(members: Iterable[Any]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each weight of the model that an optimizer updates, with its moments of AdamW."""
    for member in members:
        state = member.optimizer.state
        groups = [group["params"] for group in member.optimizer.param_groups]
        if hasattr(member, "float16_groups"):  # the groups above then have copies of its weights
            groups = [*member.float16_groups, *member.fp32_from_fp32_groups]
        for weight in chain.from_iterable(groups):
            main = getattr(weight, "main_param", weight)  # the fp32 copy of a bf16 weight
            yield weight, [m for name, m in state[main].items() if name in MOMENTS]


def _set_step(state: dict[str, Any], step: int, optimizer: Any) -> None:
    """Store AdamW's step where each of megatron-core's optimizers looks for it."""
    if any(MOMENTUM in of_weight for of_weight in optimizer.optimizer.state.values()):
        return  # Muon has no step
    inner = state.get("optimizer", state)  # in fp32 this is torch's own state dict
    if isinstance(optimizer.optimizer, torch.optim.AdamW):
        inner["state"]["common_step"] = torch.tensor(float(step))
    else:  # Transformer Engine's AdamW
        for group in inner["param_groups"]:
            group["step"] = step
