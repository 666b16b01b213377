"""Tensors on their way from one checkpoint to another, one at a time: read ahead, cast, summed."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from megatron_chameleon.checkpoint.formats.base import CheckpointReader, Target, most_precise_row
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow
from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes
from megatron_chameleon.errors import CheckpointError

CAST_BLOCK = 2**24
"""Elements that are compared at a time after a cast."""

T = TypeVar("T")
Progress = Callable[[str], None]


class TensorStream:
    """The source's pieces on their way to the sink: cast, and looked at while they pass.

    Args:
        source: Where they come from.
        target: What they become.
        progress: Gets a line after each layer.
        verify: Whether checksums will be wanted.
    """

    def __init__(
        self, source: CheckpointReader, target: Target, progress: Progress, verify: bool
    ) -> None:
        self._source, self._target, self._progress = source, target, progress
        self._verify = verify
        self.checksums: dict[str, str] = {}
        self.largest_change: tuple[float, str] | None = None

    def __iter__(self) -> Iterator[tuple[TensorRow, torch.Tensor]]:
        started, layers = time.monotonic(), self._target.dimensions.num_layers
        layer = None
        for row, tensor in read_ahead(self._target.rows, self._read):
            if layer is not None and row.layer != layer:
                seconds = time.monotonic() - started
                left_seconds = seconds / (layer + 1) * (layers - layer - 1)
                self._progress(
                    f"layer {layer + 1}/{layers} · {seconds:.1f} s · {left_seconds:.0f} s left"
                )
            layer = row.layer
            yield row, tensor
            del tensor  # else it would be held until the next one is there

    def _read(self, row: TensorRow) -> torch.Tensor:
        dtype = self._target.dtype(row)
        tensor = self._source.read(most_precise_row(self._source, row, dtype))
        if tensor.dtype != dtype:
            cast = tensor.to(dtype)
            change = (_largest_change(tensor, cast, row.key), row.key)
            self.largest_change = max(change, self.largest_change or change)
            tensor = cast
        if self._verify:
            self.checksums[row.key] = checksum(tensor)
        return tensor


def read_ahead(
    found: Sequence[TensorRow], read: Callable[[TensorRow], T]
) -> Iterator[tuple[TensorRow, T]]:
    """Each row and what ``read`` gives of it; the next one is read while one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, found[0])
        for row, following in zip(found, [*found[1:], None], strict=True):
            value = pending.result()
            if following is not None:
                pending = pool.submit(read, following)
            yield row, value
            del value


def _largest_change(old: torch.Tensor, new: torch.Tensor, name: str) -> float:
    """The largest |new - old| / |old| of an element.

    Raises:
        CheckpointError: A finite number has become infinite.
    """
    largest = 0.0
    pairs = zip(old.flatten().split(CAST_BLOCK), new.flatten().split(CAST_BLOCK), strict=True)
    for before, after in pairs:
        wide = torch.promote_types(before.dtype, torch.float32)
        before, after = before.to(wide), after.to(wide)
        if (after.isinf() & before.isfinite()).any():
            raise CheckpointError(
                name,
                f"holds {before.abs().max():.3g}, which is beyond {new.dtype}".replace(
                    "torch.", ""
                ),
                "Use --dtype bf16 or fp32",
            )
        change = ((after - before) / before).abs().nan_to_num(0.0)  # 0/0: a zero that stayed one
        largest = max(largest, change.max().item())
    return largest


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()
