"""Save and load the state of our DeepSpeed engine, for any ZeRO stage, offload and layout.

This is not the format of DeepSpeed's own files; ``checkpoint/formats/deepspeed.py`` converts those.
They hold each rank's part of DeepSpeed's flat buffers, and load at the same stage and layout only.

Here DeepSpeed hands out and takes back whole tensors, parameter by parameter
(``deepspeed.utils.safe_get_full_fp32_param`` and similar functions). They are stored as
megatron-core's sharded tensors under the names of ``checkpoint/state/reader.py``, like those of the
other engine. The data-parallel ranks take turns in keeping a parameter until it is written, so that
each rank needs memory for its share only.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_chameleon.checkpoint.names.optimizer_state import (
    AVERAGE,
    MAIN_WEIGHT,
    MOMENTS,
    OPTIMIZER_PREFIX,
    optimizer_parts,
)
from megatron_chameleon.checkpoint.names.partial_state import (
    clear_frozen_rows,
    split_in,
    to_load,
    to_store,
    weight_to_load,
)
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.state.torch_dist import (
    ShardedFiles,
    ShardedSnapshot,
    load_sharded,
)

BATCH_ELEMENTS = 256 * 2**20
"""Number of elements that are loaded at once: 3 GiB with their moments."""


class ShardedState:
    """How megatron-core stores each parameter, recorded while the parameters are whole.

    Args:
        model: This rank's part of the model, before DeepSpeed gets it.
        split: The stacked weights of which only some layers are trained.
        is_kept: Which parameters are saved and loaded, by their names; None: all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        split: frozenset[str] = frozenset(),
        is_kept: Callable[[str], bool] | None = None,
    ) -> None:
        self._split = split
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        named = model.named_parameters()
        self._parameters = {name: p for name, p in named if is_kept is None or is_kept(name)}
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        entries = model.sharded_state_dict(metadata={"dp_cp_group": group})  # type: ignore[operator]
        self._entries: dict[str, Any] = {}
        for order, name in enumerate(self._parameters):
            turn = (group.rank() - order) % group.size()
            replica_id = (*entries[name].replica_id[:-1], turn)
            self._entries[name] = dataclasses.replace(
                entries[name], data=None, replica_id=replica_id
            )

    def snapshot(self, optimizer: Any) -> "DeepSpeedSnapshot":
        """The state of ``engine.optimizer``, about to be saved."""
        return DeepSpeedSnapshot(self, optimizer)

    def own_elements(self) -> Iterator[tuple[int, torch.dtype, bool]]:
        """Size and dtype of each parameter that this rank writes, and whether it is trained."""
        for name, entry in self._entries.items():
            if is_main_replica(entry.replica_id):
                parameter = self._parameters[name]
                yield self._shapes[name].numel(), parameter.dtype, parameter.requires_grad

    def collect(self, optimizer: Any) -> dict[str, Any]:
        """Weights and optimizer state as sharded tensors. A collective.

        Args:
            optimizer: ``engine.optimizer``, after its first step.
        """
        _link_state(optimizer)
        moments = (*MOMENTS, AVERAGE) if keeps_average(optimizer) else MOMENTS
        state: dict[str, Any] = {"model": {}, "optimizer": {}}
        for name, parameter in self._parameters.items():
            entry = self._entries[name]

            def keep(value: Tensor, entry: ShardedBase = entry) -> Tensor:
                own = is_main_replica(entry.replica_id)
                return value.detach().to("cpu" if own else "meta", copy=True)

            weight = _get(optimizer, parameter, MAIN_WEIGHT)
            state["model"][name] = dataclasses.replace(entry, data=keep(weight.to(parameter.dtype)))
            parts = optimizer_parts(parameter.dtype, moments) if parameter.requires_grad else ()
            for part in parts:
                value = weight if part == MAIN_WEIGHT else _get(optimizer, parameter, part)
                sharded = make_sharded_optimizer_tensor(
                    entry, keep(value), f"{OPTIMIZER_PREFIX}state.{part}"
                )
                state["optimizer"][f"{part}.{name}"] = to_store(sharded, self._split)
        return state

    def restore(
        self, checkpoint: Path, optimizer: Any, step: int, *, average: bool = False
    ) -> None:
        """Fill the optimizer, and through it the weights, from a checkpoint. A collective.

        Args:
            checkpoint: A checkpoint of any engine and layout.
            optimizer: ``engine.optimizer``, before its first step.
            step: Number of updates before the checkpoint.
            average: Whether to load the moving average of the weights too.

        Raises:
            CheckpointError: A file is missing, damaged or of another shape.
        """
        moments = (*MOMENTS, AVERAGE) if average else MOMENTS
        _create_state(optimizer, moments, step)
        self._load(checkpoint, optimizer, (MAIN_WEIGHT, *moments))

    def restore_weights(self, checkpoint: Path, optimizer: Any) -> None:
        """Fill the weights, including main weights; the moments start at zero. A collective.

        Args and Raises: as for ``restore``.
        """
        self._load(checkpoint, optimizer, (MAIN_WEIGHT,))

    def _load(self, checkpoint: Path, optimizer: Any, parts: tuple[str, ...]) -> None:
        stored = TrainingCheckpoint(checkpoint).names
        split = self._split | split_in(stored)
        if hasattr(optimizer, "checkpoint_event_prologue"):  # ZeRO 3
            optimizer.checkpoint_event_prologue()
        for names in self._batches():
            filled = [
                (name, part)
                for name in names
                for part in (parts if self._parameters[name].requires_grad else (MAIN_WEIGHT,))
            ]
            wanted = {
                f"{part}.{name}": self._to_fill(name, part, stored, split) for name, part in filled
            }
            loaded = load_sharded(
                checkpoint, {key: w for key, w in wanted.items() if w is not None}, is_whole=False
            )
            for name, part in filled:
                parameter, value = self._parameters[name], loaded.pop(f"{part}.{name}", None)
                if value is None:  # a moment of a weight that was frozen so far
                    value = torch.zeros(self._shapes[name])
                elif part in MOMENTS:
                    clear_frozen_rows(parameter, value, shape=self._shapes[name])
                _set(optimizer, parameter, part, value)
        update_weights(optimizer)

    def _to_fill(
        self, name: str, part: str, stored: Collection[str], split: Collection[str]
    ) -> ShardedBase | None:
        entry = self._entries[name]
        empty = torch.empty(self._shapes[name], dtype=torch.float32)
        sharded = make_sharded_optimizer_tensor(entry, empty, f"{OPTIMIZER_PREFIX}state.{part}")
        if part != MAIN_WEIGHT:
            found: ShardedBase | None = to_load(sharded, stored, split)
            return found
        weight = dataclasses.replace(sharded, key=entry.key)
        dtype = self._parameters[name].dtype
        is_main = dtype == torch.float32 or self._parameters[name].requires_grad
        whole: ShardedBase = weight_to_load(
            weight, torch.float32 if is_main else dtype, stored, split
        )
        return whole

    def _batches(self) -> Iterator[list[str]]:
        names: list[str] = []
        elements = 0
        for name, shape in self._shapes.items():
            if names and elements + shape.numel() > BATCH_ELEMENTS:
                yield names
                names, elements = [], 0
            names.append(name)
            elements += shape.numel()
        yield names


class DeepSpeedSnapshot:
    """A state that is about to be written; see ``Snapshot`` in ``checkpoint/state/save.py``."""

    def __init__(self, state: ShardedState, optimizer: Any) -> None:
        self._state = state
        self._optimizer = optimizer

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank will write."""
        weight_bytes = {torch.float32: 4, torch.bfloat16: 2 + 4}  # bf16 also has fp32 main weights
        moments = len(MOMENTS) + keeps_average(self._optimizer)
        return sum(
            count * (weight_bytes[dtype] + 4 * moments if is_trained else dtype.itemsize)
            for count, dtype, is_trained in self._state.own_elements()
        )

    def stage(self, folder: Path, *, keep: bool) -> ShardedFiles:
        """Copy the tensors and plan the files; see ``ShardedSnapshot``. A collective."""
        snapshot = ShardedSnapshot(
            self._state.collect(self._optimizer), is_replicated=False, is_copy=True
        )
        return snapshot.stage(folder, keep=keep)


def _flat_parameters(optimizer: Any) -> list[Tensor]:
    """The tensors that the inner optimizer updates, found by DeepSpeed's names for them."""
    for name in (
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 in bf16 with gradients summed in fp32
        "fp32_partitioned_groups_flat",  # ZeRO 3
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    assert isinstance(optimizer, Optimizer), f"unknown optimizer {type(optimizer).__name__}"
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def updated_tensors(optimizer: Any) -> Iterator[tuple[Optimizer, Tensor]]:
    """Torch's AdamW and each fp32 tensor of this rank that it updates.

    Args:
        optimizer: ``engine.optimizer``.
    """
    inner = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
    for flat in _flat_parameters(optimizer):
        yield inner, flat


def keeps_average(optimizer: Any) -> bool:
    """Whether a moving average of the weights is kept beside the moments."""
    return any(AVERAGE in inner.state.get(flat, ()) for inner, flat in updated_tensors(optimizer))


def _create_state(optimizer: Any, moments: Sequence[str], step: int) -> None:
    """Give the inner AdamW the state that its first step would create, with its step set."""
    for inner, flat in updated_tensors(optimizer):
        state = {moment: torch.zeros_like(flat) for moment in moments}
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
        inner.state[flat] = state
    _link_state(optimizer)


def _link_state(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 find each parameter's moments within the flat tensors.

    DeepSpeed 0.19 does this only once, after the step of its first group, when the second group's
    moments do not exist yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _get(optimizer: Any, parameter: nn.Parameter, part: str) -> Tensor:
    """A parameter's whole fp32 main weight or moment. A collective under ZeRO."""
    if not parameter.requires_grad:
        return _frozen_weight(parameter)
    if isinstance(optimizer, Optimizer):
        return parameter.detach() if part == MAIN_WEIGHT else optimizer.state[parameter][part]
    if part == MAIN_WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _set(optimizer: Any, parameter: nn.Parameter, part: str, value: Tensor) -> None:
    """Set this rank's part of a parameter's main weight or moment from the whole fp32 tensor."""
    if isinstance(optimizer, Optimizer):
        _get(optimizer, parameter, part).copy_(value)
        return
    if not parameter.requires_grad:
        _set_frozen_weight(parameter, value)
        return
    set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3, whose setters of whole tensors ignore padding
        size, rank = parameter.ds_tensor.numel(), parallel_state.get_data_parallel_rank()
        part_of_rank = torch.zeros(size)
        values = value.flatten()[rank * size : (rank + 1) * size]
        part_of_rank[: values.numel()] = values
        value, set_weight, set_moment = (
            part_of_rank,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )
    if part == MAIN_WEIGHT:
        set_weight(parameter, value)
    else:
        set_moment(parameter, value, part)


def _frozen_weight(parameter: Any) -> Tensor:
    """A whole weight that DeepSpeed's optimizer does not know. A collective under ZeRO 3."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _set_frozen_weight(parameter: Any, value: Tensor) -> None:
    """Set this rank's part of such a weight from the whole tensor."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    own, rank = parameter.ds_tensor, parallel_state.get_data_parallel_rank()
    values = value.flatten()[rank * own.numel() : (rank + 1) * own.numel()]
    own.data.flatten()[: values.numel()].copy_(values)


def update_weights(optimizer: Any) -> None:
    """Copy the optimizer's main weights to the model's weights. A collective under ZeRO."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "checkpoint_event_epilogue"):  # ZeRO 3
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
