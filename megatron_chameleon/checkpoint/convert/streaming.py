"""Tensors on their way from one checkpoint to another, one at a time.

They are read ahead, cast to the new dtype, and given a checksum.
"""

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
"""Number of elements that are compared at a time after a cast."""

T = TypeVar("T")
Progress = Callable[[str], None]


class TensorStream:
    """The rows that a writer gets, each with its tensor, cast to the target's dtype.

    Args:
        reader: The checkpoint that the tensors come from.
        target: What they become.
        progress: Called with a line after each layer.
        verify: Whether to compute checksums.

    Attributes:
        checksums: SHA-256 of each tensor that has passed, by its row's key.
        largest_change: The largest relative change of an element by a cast, and the key of its row;
            None as long as nothing was cast.
    """

    def __init__(
        self, reader: CheckpointReader, target: Target, progress: Progress, verify: bool
    ) -> None:
        self._reader, self._target, self._progress = reader, target, progress
        self._verify = verify
        self.checksums: dict[str, str] = {}
        self.largest_change: tuple[float, str] | None = None

    def __iter__(self) -> Iterator[tuple[TensorRow, torch.Tensor]]:
        started, layers = time.monotonic(), self._target.dimensions.num_layers
        layer = None
        for row, tensor in read_tensors_ahead(self._target.rows, self._read):
            if layer is not None and row.layer != layer:
                seconds = time.monotonic() - started
                left_seconds = seconds / (layer + 1) * (layers - layer - 1)
                self._progress(
                    f"layer {layer + 1}/{layers} · {seconds:.1f} s · {left_seconds:.0f} s left"
                )
            layer = row.layer
            yield row, tensor
            del tensor  # otherwise it would stay in memory until the next one arrives

    def _read(self, row: TensorRow) -> torch.Tensor:
        dtype = self._target.dtype(row)
        tensor = self._reader.read(most_precise_row(self._reader, row, dtype))
        if tensor.dtype != dtype:
            cast = tensor.to(dtype)
            change = (_largest_change(tensor, cast, row.key), row.key)
            self.largest_change = max(change, self.largest_change or change)
            tensor = cast
        if self._verify:
            self.checksums[row.key] = checksum(tensor)
        return tensor


def read_tensors_ahead(
    rows: Sequence[TensorRow], read: Callable[[TensorRow], T]
) -> Iterator[tuple[TensorRow, T]]:
    """Each row and what ``read`` returns for it; the next row is read while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, rows[0])
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            value = pending.result()
            if following is not None:
                pending = pool.submit(read, following)
            yield row, value
            del value


def _largest_change(old: torch.Tensor, new: torch.Tensor, name: str) -> float:
    """The largest |new - old| / |old| of an element.

    Raises:
        CheckpointError: A finite number became infinite.
    """
    largest = 0.0
    pairs = zip(old.flatten().split(CAST_BLOCK), new.flatten().split(CAST_BLOCK), strict=True)
    for before, after in pairs:
        wide = torch.promote_types(before.dtype, torch.float32)
        before, after = before.to(wide), after.to(wide)
        if (after.isinf() & before.isfinite()).any():
            dtype = str(new.dtype).removeprefix("torch.")
            what = f"holds {before.abs().max():.3g}, which is beyond {dtype}"
            raise CheckpointError(name, what, "Use --dtype bf16 or fp32")
        change = ((after - before) / before).abs().nan_to_num(0.0)  # 0/0: a zero stayed a zero
        largest = max(largest, change.max().item())
    return largest


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()
