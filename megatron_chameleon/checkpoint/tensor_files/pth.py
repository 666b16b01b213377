"""Write and read PyTorch's ``.pth`` files tensor by tensor.

``torch.save`` and ``torch.load`` move all tensors of a file at once. Here a file is laid out
without the tensors' data (``torch.serialization.skip_data``), and ``torch_pickles.py`` finds where
in the file it belongs. Each tensor is then written to its place, or read from there, on its own.

The zip archive's checksums remain those of empty records. Torch ignores them, but ``unzip -t``
reports them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import (
    REMEDY,
    StoredTensor,
    load_without_data,
)
from megatron_chameleon.errors import CheckpointError


class PthFile:
    """The tensors of one ``.pth`` file.

    Args:
        path: A file that ``torch.save`` or ``create_pth`` wrote: a dict of tensors by name, or such
            a dict under the key ``state_dict``.

    Attributes:
        tensors: The place of each tensor by its name.

    Raises:
        CheckpointError: The file is missing, cut off, another kind of archive, or has other
            content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = load_without_data(path)
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        if not isinstance(content, Mapping):
            what = f"holds a {type(content).__name__}, not tensors by name"
            raise CheckpointError(str(path), what, REMEDY)
        self.tensors: dict[str, StoredTensor] = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
                label = name[:200] if isinstance(name, str) else type(name).__name__
                what = f"{label} is a {type(tensor).__name__}, not a tensor by name"
                raise CheckpointError(str(path), what, REMEDY)
            self.tensors[name] = tensor.check(name)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: The file ends too early.
        """
        return self.tensors[name].read(name)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place."""
        stored = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype), name
        with self.path.open("r+b") as stream:
            stream.seek(stored.offset_bytes)
            stream.write(as_bytes(tensor))


def create_pth(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> PthFile:
    """Create a file in full size whose tensors have no data yet; ``PthFile.write`` fills them.

    Args:
        path: The file.
        tensors: Shape and dtype of each tensor by its name.
    """
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        empty = {name: torch.empty(s, dtype=dtype) for name, (s, dtype) in tensors.items()}
        torch.save(empty, path)
    return PthFile(path)
