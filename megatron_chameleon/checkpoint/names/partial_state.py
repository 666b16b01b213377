"""How the optimizer state of a partly trained model is stored and restored.

A checkpoint stacks the layers' tensors along a leading dimension, and a stacked tensor must be
whole. A layer that is not trained has no optimizer state. So where this is so for some layers of a
tensor, the state of the others is stored layer by layer:

    optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight       [layers, H, F]: all of them
    optimizer.state.exp_avg.decoder.layers.3.mlp.linear_fc2.weight     [H, F]: this one
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_chameleon.checkpoint.names.optimizer_state import (
    MAIN_WEIGHT,
    OPTIMIZER_PREFIX,
    optimizer_key,
)

_LAYERS = "decoder.layers."
_ONE_LAYER = re.compile(rf"(?<={re.escape(_LAYERS)})\d+\.")
_STATE = re.compile(rf"{re.escape(OPTIMIZER_PREFIX)}state\.[a-z0-9_]+\.")
FROZEN_ROWS = "frozen_rows"
"""The attribute of a parameter whose rows are partly trained, on every tensor-parallel rank: ranges
[first, last) of this rank's rows that are not."""


def clear_frozen_rows(
    parameter: Tensor, moment: Tensor, start: int = 0, shape: Sequence[int] | None = None
) -> None:
    """Set the moments of a parameter's frozen rows to zero, so that AdamW does not move them.

    A checkpoint has other moments if these rows were trained before.

    Args:
        parameter: This rank's part.
        moment: Its moment, or a range of the flattened one; contiguous.
        start: Index of the range's first element.
        shape: Of the parameter where ZeRO has taken it apart.
    """
    width = math.prod((parameter.shape if shape is None else shape)[1:])
    for first, last in getattr(parameter, FROZEN_ROWS, ()):
        begin, end = first * width - start, last * width - start
        moment.view(-1)[max(begin, 0) : max(end, 0)] = 0


def layer_key(key: str, layer: int) -> str:
    """The name of one layer's part of a stacked tensor, if it is stored by itself."""
    return key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)


def weight_of(key: str) -> str:
    """The name of the weight that a part of the optimizer's state belongs to."""
    return _STATE.sub("", key, count=1)


def to_store(sharded: Any, split: Collection[str]) -> Any:
    """A sharded tensor of the optimizer's state, under the name to store it by.

    Args:
        sharded: Part of a stacked tensor, or not.
        split: The stacked weights of which only some layers are trained.
    """
    return _of_one_layer(sharded) if weight_of(sharded.key) in split else sharded


def split_in(names: Collection[str]) -> frozenset[str]:
    """The stacked weights of which a checkpoint has the state of single layers.

    Args:
        names: All names in the checkpoint.
    """
    alone = (name for name in names if _STATE.match(name) and _ONE_LAYER.search(name))
    return frozenset(_ONE_LAYER.sub("", weight_of(name)) for name in alone)


def to_load(sharded: Any, names: Collection[str], split: Collection[str]) -> Any:
    """A sharded tensor under the name by which a checkpoint has it; None: it does not.

    Args:
        sharded: Of the model or the optimizer, with the name of a stacked tensor.
        names: All names in the checkpoint.
        split: The stacked weights of which only some layers are asked for, or are stacked.
    """
    if sharded.key in names:
        return _part_of_stack(sharded) if weight_of(sharded.key) in split else sharded
    if _LAYERS not in sharded.key:
        return None
    alone = _of_one_layer(sharded)
    return alone if _pieces(alone)[0].key in names else None


def weight_to_load(
    sharded: Any, dtype: torch.dtype, names: Collection[str], split: Collection[str]
) -> Any:
    """The sharded tensor of a weight under the name by which a checkpoint has it most precisely.

    This is the fp32 main weight where fp32 is wanted and the checkpoint has one.

    Args:
        sharded: With the name of the weight.
        dtype: The dtype in which the weight is wanted.
        names: All names in the checkpoint.
        split: As for ``to_load``.
    """
    if dtype == torch.float32:
        main = replace(sharded, key=optimizer_key(MAIN_WEIGHT, sharded.key))
        if (found := to_load(main, names, split)) is not None:
            return found
    return _part_of_stack(sharded) if sharded.key in split else sharded


def _part_of_stack(sharded: Any) -> Any:
    """Part of a stacked tensor, for a process that may ask for some of the layers only.

    Otherwise megatron-core expects that the processes together ask for all of a tensor.
    """

    def build(key: str, data: Tensor, *args: Any) -> list[ShardedTensor]:
        pieces = [replace(sharded, key=key, data=data)]
        if isinstance(sharded, ShardedTensorFactory):
            pieces = sharded.build_fn(key, data, *args)
        return [_with_layer_axis(piece) for piece in pieces]

    def merge(parts: list[Tensor]) -> Any:
        found = [part[0] for part in parts]
        is_joined = isinstance(sharded, ShardedTensorFactory)
        return sharded.merge_fn(found) if is_joined else found[0]

    if isinstance(sharded, ShardedTensor) and not sharded.prepend_axis_num:
        return sharded  # a block of any shape, which already has the axis
    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, sharded.replica_id)


def _with_layer_axis(piece: ShardedTensor) -> ShardedTensor:
    shape = (*[1] * piece.prepend_axis_num, *piece.local_shape)
    return replace(
        piece,
        data=piece.data.view(shape),
        local_shape=shape,
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


def _of_one_layer(sharded: Any) -> Any:
    """Part of a stacked tensor as part of its layer's tensor alone."""
    if isinstance(sharded, ShardedTensorFactory):
        build = sharded.build_fn

        def build_alone(*args: Any) -> Any:
            return [_of_one_layer(piece) for piece in build(*args)]

        return replace(sharded, build_fn=build_alone)
    is_prepended = sharded.prepend_axis_num > 0
    shape = sharded.local_shape if is_prepended else sharded.local_shape[1:]
    fragments = sharded.axis_fragmentations
    return replace(
        sharded,
        key=layer_key(sharded.key, sharded.global_offset[0]),
        data=None if sharded.data is None else sharded.data.view(shape),
        local_shape=shape,
        global_shape=sharded.global_shape[1:],
        global_offset=sharded.global_offset[1:],
        axis_fragmentations=None if fragments is None else fragments[1:],
        prepend_axis_num=max(sharded.prepend_axis_num - 1, 0),
    )


def _pieces(sharded: Any) -> list[ShardedTensor]:
    return list(sharded.build()) if isinstance(sharded, ShardedTensorFactory) else [sharded]
