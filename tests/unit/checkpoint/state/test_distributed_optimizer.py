"""A range of a tensor's elements is cut into rectangles that contain each element once."""

import itertools
from collections.abc import Callable

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron_chameleon.checkpoint.state.distributed_optimizer import (
    _sharded_rectangles,
    rectangles,
)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4)])
def test_every_range_of_every_shape(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        found = []
        for cut in rectangles(start, stop, shape):
            place = tuple(slice(o, o + n) for o, n in zip(cut.offset, cut.shape, strict=True))
            elements = numbers[place].flatten().tolist()
            assert elements == list(range(cut.start, cut.stop))
            found += elements
        assert found == list(range(start, stop))


def test_a_matrix_needs_three_rectangles_at_most() -> None:
    assert [cut.shape for cut in rectangles(3, 50, (8, 7))] == [(1, 4), (6, 7), (1, 1)]
    assert [cut.shape for cut in rectangles(7, 49, (8, 7))] == [(6, 7)]
    assert [cut.shape for cut in rectangles(8, 12, (8, 7))] == [(1, 4)]
    assert not list(rectangles(5, 5, (8, 7)))


def whole(tensor: torch.Tensor) -> ShardedBase:
    return ShardedTensor.from_rank_offsets("w", tensor, (0, 1, 2), replica_id=(0, 0, 1))


def in_two_halves(tensor: torch.Tensor) -> ShardedBase:
    """As megatron-core stores a SwiGLU's weight: rank 1 of 2 has a part of each half."""

    def build(key: str, values: torch.Tensor, replica_id: object, _: object) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(key, half, (0, place, 4), replica_id=replica_id)
            for half, place in zip(values.chunk(2), (1, 3), strict=True)
        ]

    return ShardedTensorFactory("w", tensor, build, lambda parts: parts, replica_id=(0, 0, 1))


def layer_of_three(tensor: torch.Tensor) -> ShardedBase:
    return ShardedTensor.from_rank_offsets(
        "w", tensor, (0, 2, 3), (1, 1, 2), replica_id=(0, 0, 1), prepend_axis_num=1
    )


@pytest.mark.parametrize("make_sharded", [whole, in_two_halves, layer_of_three])
def test_rectangles_are_placed_where_the_parameter_is(
    make_sharded: Callable[[torch.Tensor], ShardedBase],
) -> None:
    """Two data-parallel ranks' ranges together are the parameter, at its place in the whole."""
    local = torch.arange(24.0).reshape(6, 4)
    sharded = make_sharded(local)
    parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
    expected = torch.full(parts[0].global_shape, -1.0)
    for part in parts:
        expected[part.global_slice()] = part.data
    for border in range(25):
        found = torch.full_like(expected, -1.0)
        for start, stop in ((0, border), (border, 24)):
            values = local.flatten()[start:stop]
            for rectangle in _sharded_rectangles(sharded, "key", values, start, stop):
                assert (rectangle.key, rectangle.replica_id) == ("key", (0, 0, 0))
                place = rectangle.global_slice()
                assert (found[place] == -1).all(), "written twice"
                found[place] = rectangle.data
        assert torch.equal(found, expected), border
