"""PyTorch's ``.pth`` files, written and read tensor by tensor.

``torch.save`` and ``torch.load`` move all tensors of a file at once. Both can leave the tensors'
bytes out (``torch.serialization.skip_data``, ``map_location="meta"``) and say where in the file
they belong: they go to their place, and come from there, one by one. The pickle is read with
``weights_only`` and so runs no code.

The zip archive's checksums of the tensors stay those of empty records: torch does not look at them,
``unzip -t`` does.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes, empty, read_into
from megatron_chameleon.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's numbers lie in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @classmethod
    def find(cls, path: Path, name: str, tensor: torch.Tensor) -> "StoredTensor":
        """The place of a tensor that ``load_without_data`` gave.

        Raises:
            CheckpointError: It is not contiguous.
        """
        if not tensor.is_contiguous():
            raise CheckpointError(str(path), f"{name} is not contiguous", "Save contiguous tensors")
        start = tensor.untyped_storage()._checkpoint_offset
        assert start is not None
        offset = start + int(tensor.storage_offset()) * tensor.itemsize
        return cls(path, tuple(tensor.shape), tensor.dtype, offset)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; ``name`` is for messages.

        Raises:
            CheckpointError: The file ends before it does.
        """
        return self.read_flat(name, 0, torch.Size(self.shape).numel()).view(self.shape)

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count] numbers in row-major order, from number ``start`` on.

        Raises:
            CheckpointError: The file ends before.
        """
        offset = self.offset_bytes + start * self.dtype.itemsize
        return read_into(empty((count,), self.dtype), self.path, offset, name)


def load_without_data(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """What a file holds, with tensors that have no numbers but know their place.

    Args:
        path: Written by ``torch.save``.
        allowed: Classes that may be in it beside what torch itself allows; as for
            ``torch.serialization.safe_globals``.

    Raises:
        CheckpointError: It is missing, cut, an archive of another kind, or wants to run code.
    """
    remedy = "Give a file of plain tensors, saved by torch"
    try:
        if not zipfile.is_zipfile(path):
            what = (
                "no such file"
                if not path.exists()
                else "is no whole zip archive, which torch saves"
            )
            raise CheckpointError(str(path), what, "Copy it again, or save it with torch >= 1.6")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"would run code when it is loaded ({_asked_for(error)})"
        raise CheckpointError(str(path), what, remedy) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(str(path), f"cannot be read ({reason})", remedy) from error


class PthFile:
    """The tensors of one file.

    Args:
        path: Written by ``torch.save`` (or ``create``): a dict of tensors by name, or such a dict
            under the key ``state_dict``.

    Attributes:
        tensors: By name.

    Raises:
        CheckpointError: It is missing, cut, an archive of another kind, or holds something else.
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
                what = f"{name} is a {type(tensor).__name__}, no tensor"
                raise CheckpointError(str(path), what, remedy)
            self.tensors[str(name)] = StoredTensor.find(path, str(name), tensor)

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            CheckpointError: The file ends before it does.
        """
        return self.tensors[name].read(name)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place."""
        stored = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype), name
        with self.path.open("r+b") as stream:
            stream.seek(stored.offset_bytes)
            stream.write(as_bytes(tensor))


def create(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> PthFile:
    """A file in full size whose tensors are still empty: ``write`` fills them.

    Args:
        path: The file.
        tensors: Shape and dtype by name.
    """
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        empty = {name: torch.empty(s, dtype=dtype) for name, (s, dtype) in tensors.items()}
        torch.save(empty, path)
    return PthFile(path)


def _asked_for(error: Exception) -> str:
    """What torch's long message says of the name that the file wants to import."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    return lines[0].partition(". ")[0] if lines else str(error).splitlines()[0]
