"""Write and read PyTorch's ``.pth`` files tensor by tensor.

``torch.save`` and ``torch.load`` move all tensors of a file at once. Both can leave out the
tensors' data (``torch.serialization.skip_data``, ``map_location="meta"``) and say where in the file
it belongs. Each tensor is then written to its place, or read from there, on its own. The pickle is
read with ``weights_only`` and so cannot run code.

The zip archive's checksums remain those of empty records. Torch ignores them, but ``unzip -t``
reports them.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes, empty_tensor, read_into
from megatron_chameleon.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's data is in a file.

    Attributes:
        path: The file.
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        offset_bytes: Where its data begins in the file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @classmethod
    def find(cls, path: Path, name: str, tensor: torch.Tensor) -> "StoredTensor":
        """Find the place of a tensor that ``load_without_data`` returned.

        Raises:
            CheckpointError: The tensor is not contiguous.
        """
        if not tensor.is_contiguous():
            raise CheckpointError(str(path), f"{name} is not contiguous", "Save contiguous tensors")
        start = tensor.untyped_storage()._checkpoint_offset
        assert start is not None
        offset = start + int(tensor.storage_offset()) * tensor.itemsize
        return cls(path, tuple(tensor.shape), tensor.dtype, offset)

    def read(self, name: str) -> torch.Tensor:
        """Read the whole tensor; ``name`` is for errors.

        Raises:
            CheckpointError: The file ends too early.
        """
        return self.read_flat(name, 0, torch.Size(self.shape).numel()).view(self.shape)

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read [count] elements in row-major order, beginning with element ``start``.

        Raises:
            CheckpointError: The file ends too early.
        """
        offset = self.offset_bytes + start * self.dtype.itemsize
        return read_into(empty_tensor((count,), self.dtype), self.path, offset, name)


def load_without_data(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Load a file's content, with tensors on the meta device that know their place in the file.

    Args:
        path: A file that ``torch.save`` wrote.
        allowed: Classes that the file may contain besides those that torch itself allows; as for
            ``torch.serialization.safe_globals``.

    Raises:
        CheckpointError: The file is missing, cut off, another kind of archive, or would run code.
    """
    remedy = "Give a file of plain tensors, saved by torch"
    try:
        if not zipfile.is_zipfile(path):
            what = "no such file"
            if path.exists():
                what = "is not a complete zip archive, as torch.save writes it"
            raise CheckpointError(str(path), what, "Copy it again, or save it with torch >= 1.6")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"would run code when it is loaded ({_forbidden_name(error)})"
        raise CheckpointError(str(path), what, remedy) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(str(path), f"cannot be read ({reason})", remedy) from error


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
        remedy = "Give a file of plain tensors, saved by torch"
        content = load_without_data(path)
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        if not isinstance(content, Mapping):
            what = f"holds a {type(content).__name__}, not tensors by name"
            raise CheckpointError(str(path), what, remedy)
        self.tensors: dict[str, StoredTensor] = {}
        for name, tensor in content.items():
            if not isinstance(tensor, torch.Tensor):
                what = f"{name} is a {type(tensor).__name__}, not a tensor"
                raise CheckpointError(str(path), what, remedy)
            self.tensors[str(name)] = StoredTensor.find(path, str(name), tensor)

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


def _forbidden_name(error: Exception) -> str:
    """The part of torch's long message about the name that the file tries to import."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    return lines[0].partition(". ")[0] if lines else str(error).splitlines()[0]
