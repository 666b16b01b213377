"""Save and load megatron-core's distributed optimizer without gathering anything.

Each data-parallel rank owns a range of elements of each flattened parameter. To store the state in
a form that fits any layout, megatron-core gathers all of it on one rank or on every rank (84 GB for
the 7B), and every rank reads all of it again. Here a range is cut into rectangles of the whole
tensor, at most three for a matrix, and each rank writes and reads its own.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_chameleon.checkpoint.names.optimizer_state import (
    AVERAGE,
    MAIN_WEIGHT,
    MOMENTS,
    optimizer_key,
    optimizer_parts,
)
from megatron_chameleon.checkpoint.names.partial_state import (
    clear_frozen_rows,
    to_load,
    to_store,
    weight_to_load,
)
from megatron_chameleon.checkpoint.state.torch_dist import load_sharded

_NAMES = {MAIN_WEIGHT: "param"}
"""megatron-core's names for parts of the state, where they differ."""


@dataclass(frozen=True)
class Rectangle:
    """A block of a tensor whose elements are also adjacent in the flat tensor.

    Attributes:
        offset: Index of its first element in each dim.
        shape: Its size in each dim.
        start: Index of its first element in the flat tensor.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    """Cut a range of a flat tensor's elements into as few rectangles as possible.

    Args:
        start: Index of the first element in the flat tensor.
        stop: Index after the last element.
        shape: The tensor's shape.
    """
    if start >= stop:
        return
    if not shape:
        yield Rectangle((), (), 0)
        return
    row_elements = prod(shape[1:])
    first, last = -(-start // row_elements), stop // row_elements  # whole rows
    if first > last:  # within one row
        yield from _within_row(last, start, stop, shape)
        return
    yield from _within_row(first - 1, start, first * row_elements, shape)
    if first < last:
        offset, sizes = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        yield Rectangle(offset, sizes, first * row_elements)
    yield from _within_row(last, last * row_elements, stop, shape)


def _within_row(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    begin = row * prod(shape[1:])
    for inner in rectangles(start - begin, stop - begin, shape[1:]):
        yield Rectangle((row, *inner.offset), (1, *inner.shape), begin + inner.start)


def sharded_ranges(
    optimizers: Sequence[DistributedOptimizer],
    model: Sequence[ShardedBase],
    split: Collection[str] = (),
) -> dict[str, ShardedTensor]:
    """The optimizer state of this rank's ranges, as sharded tensors to be saved.

    Args:
        optimizers: The optimizers, after at least one step.
        model: The model's sharded tensors, with the parameters themselves in them.
        split: The stacked weights of which only some layers are trained.
    """
    found: dict[str, ShardedTensor] = {}
    for optimizer, parameter, sharded, start, stop in _owned(optimizers, model):
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        moments = [name for name in state if name not in ("param", "step")]
        for part in optimizer_parts(parameter.dtype, moments):
            values = state[_NAMES.get(part, part)].detach()
            for rectangle in _sharded_rectangles(
                sharded, optimizer_key(part, sharded.key), values, start, stop
            ):
                found[str(len(found))] = to_store(rectangle, split)
    return found


@torch.no_grad()
def load_ranges(
    optimizers: Sequence[DistributedOptimizer],
    model: Sequence[ShardedBase],
    checkpoint: Path,
    stored: Collection[str],
    step: int,
    *,
    average: bool = False,
) -> None:
    """Load the optimizer state of this rank's ranges; see ``load_optimizer``. A collective.

    Args:
        optimizers: The optimizers, before their first step.
        model: As for ``sharded_ranges``.
        checkpoint: A whole checkpoint of any engine and layout.
        stored: All names in the checkpoint.
        step: Number of updates before the checkpoint.
        average: Whether to load the moving average of the weights too.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    parts = (MAIN_WEIGHT, *MOMENTS, *((AVERAGE,) if average else ()))
    for optimizer in optimizers:
        if not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()
        if average:
            for weight, own in optimizer.optimizer.state.items():
                own[AVERAGE] = torch.empty_like(weight)
    wanted: dict[str, ShardedTensor] = {}
    filled: list[tuple[DistributedOptimizer, nn.Parameter, int, dict[str, Tensor]]] = []
    for optimizer, parameter, sharded, start, stop in _owned(optimizers, model):
        state = {_NAMES.get(part, part): torch.empty(stop - start) for part in parts}
        for part in parts:
            is_weight, values = part == MAIN_WEIGHT, state[_NAMES.get(part, part)]
            key = sharded.key if is_weight else optimizer_key(part, sharded.key)
            for rectangle in _sharded_rectangles(sharded, key, values, start, stop):
                if is_weight:
                    found = weight_to_load(rectangle, torch.float32, stored, ())
                else:
                    found = to_load(rectangle, stored, ())
                if found is None:  # the weight was frozen so far
                    rectangle.data.zero_()
                else:
                    wanted[str(len(wanted))] = found
        filled.append((optimizer, parameter, start, state))
    loaded = load_sharded(checkpoint, dict(wanted), is_whole=False)
    for key, rectangle in wanted.items():
        if loaded[key].data_ptr() != rectangle.data.data_ptr():
            rectangle.data.copy_(loaded[key])
    for optimizer, parameter, start, state in filled:
        for part in MOMENTS:
            clear_frozen_rows(parameter, state[part], start)
        _set(optimizer, parameter, state, step)


def _set(
    optimizer: DistributedOptimizer, parameter: nn.Parameter, state: dict[str, Tensor], step: int
) -> None:
    """Set a parameter's state, and the step where the inner optimizer stores it."""
    group_index, order = optimizer.model_param_group_index_map[parameter]
    group = optimizer.optimizer.param_groups[group_index]
    own = optimizer.optimizer.state[group["params"][order]]
    if "step" in own:  # torch's AdamW has a step per parameter
        own["step"] = torch.tensor(float(step))
        state = {**state, "step": own["step"]}
    else:  # Transformer Engine's has one per group
        group["step"] = step
    optimizer._set_main_param_and_optimizer_states(parameter, state)


def _owned(
    optimizers: Sequence[DistributedOptimizer], model: Sequence[ShardedBase]
) -> Iterator[tuple[DistributedOptimizer, nn.Parameter, ShardedBase, int, int]]:
    """The parameters of which this rank owns elements, and the range that it owns.

    Yields:
        Optimizer, parameter, the parameter's sharded tensor, and the first and last index (the
        latter exclusive) in the flat local parameter.
    """
    entries = {id(sharded.data): sharded for sharded in model}
    for optimizer in optimizers:
        for buffer in optimizer.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        own = ranges["param"]
                        yield optimizer, parameter, entries[id(parameter)], own.start, own.end


def _sharded_rectangles(
    sharded: ShardedBase, key: str, values: Tensor, start: int, stop: int
) -> Iterator[ShardedTensor]:
    """A range of a local parameter's elements, as rectangles of the whole tensor.

    Args:
        sharded: The parameter's sharded tensor. Megatron-core stores a SwiGLU's two halves as two
            tensors.
        key: The name to store the values under.
        values: [stop - start].
        start: Index of the range's first element in the flat local parameter.
        stop: Index after the last element.
    """
    parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
    begin = 0
    for part in parts:
        end = begin + prod(part.local_shape)
        for cut in rectangles(max(start, begin) - begin, min(stop, end) - begin, part.local_shape):
            ahead = part.prepend_axis_num
            offset = (*(0 for _ in range(ahead)), *cut.offset)
            shape = (*(1 for _ in range(ahead)), *cut.shape)
            yield ShardedTensor(
                key=key,
                data=values[begin + cut.start - start : begin + cut.stop - start].view(shape),
                dtype=values.dtype,
                local_shape=shape,
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # rectangles of any size
                # no other data-parallel rank has it, but tensor-parallel ranks may
                replica_id=(*part.replica_id[:-1], 0),
            )
        begin = end
