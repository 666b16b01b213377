"""Move tensors' bytes between memory and files without extra copies.

Where the kernel provides memory in pages of 4 KiB, getting fresh memory costs more than copying
into it. numpy asks for large pages, so buffers are allocated by numpy.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import cannot_read, open_to_read


def element_count(shape: Sequence[int]) -> int:
    """The number of elements of a tensor of this shape."""
    return math.prod(shape)


def empty_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU with undefined content."""
    size_bytes = element_count(shape) * dtype.itemsize
    if not size_bytes:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.empty(size_bytes, np.uint8)).view(dtype).view(torch.Size(shape))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; no copy if a CPU tensor is contiguous already."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_into(tensor: torch.Tensor, path: Path, offset_bytes: int, name: str) -> torch.Tensor:
    """Fill a contiguous tensor from a file.

    Args:
        tensor: A tensor on the CPU.
        path: The file.
        offset_bytes: Where the tensor's bytes begin in the file.
        name: The tensor's name, for errors.

    Returns:
        The same tensor.

    Raises:
        CheckpointError: The file ends too early.
    """
    buffer = as_bytes(tensor)
    with open_to_read(path, CheckpointError) as stream:
        try:
            stream.seek(offset_bytes)
            found = stream.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise cannot_read(path, error, CheckpointError) from error
    if found < len(buffer):
        what = f"ends after {found:,} of {len(buffer):,} bytes of {name}"
        raise CheckpointError(str(path), what, "Copy it again")
    return tensor
