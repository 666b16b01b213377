"""Read what ``torch.save`` wrote, without the tensors' data and without torch.

A file, or a chunk of a larger file, is a zip archive with a pickle, ``data.pkl``, and one record
for each storage. The pickle is read by ``pickles.py`` with stand-ins for torch's functions. So no
code is run, no memory is allocated for tensors, and a tensor becomes a ``StoredTensor``, which
knows its place in the file.

``torch.load`` with ``weights_only`` runs no code either, but a hundred bytes can make it allocate
all of the memory or work forever.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from megatron_chameleon.checkpoint.tensor_files.pickles import BoundedUnpickler
from megatron_chameleon.checkpoint.tensor_files.raw import empty_tensor, read_into
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.files import open_to_read

LARGEST_PICKLE_BYTES = 64 << 20
LARGEST_DIRECTORY_BYTES = 16 << 20
"""The directory of an archive with 10,000 tensors has about 1 MB."""
LARGEST_DIMS = 16
LARGEST_ELEMENTS = 2**48
REMEDY = "Give a file of plain tensors, saved by torch"
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's data is in a file.

    Attributes:
        path: The file.
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        offset_bytes: Where its data begins in the file.
        is_contiguous: Whether the elements follow each other in row-major order.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    is_contiguous: bool = True

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def check(self, name: str) -> "StoredTensor":
        """The same tensor, if it can be read; ``name`` is for errors.

        Raises:
            CheckpointError: It is not contiguous.
        """
        if not self.is_contiguous:
            raise CheckpointError(
                str(self.path), f"{name} is not contiguous", "Save contiguous tensors"
            )
        return self

    def read(self, name: str) -> torch.Tensor:
        """Read the whole tensor; ``name`` is for errors.

        Raises:
            CheckpointError: The file ends too early.
        """
        return self.read_flat(name, 0, self.elements).view(self.shape)

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read [count] elements in row-major order, beginning with element ``start``.

        Raises:
            CheckpointError: The file ends too early.
        """
        offset = self.offset_bytes + start * self.dtype.itemsize
        return read_into(empty_tensor((count,), self.dtype), self.path, offset, name)


@dataclass(frozen=True)
class _Storage:
    """A record of an archive with the numbers of one or more tensors; None: untyped."""

    dtype: torch.dtype | None
    offset_bytes: int
    size_bytes: int


def load_without_data(
    path: Path, allowed: Mapping[str, Any] | None = None, start: int = 0, size: int | None = None
) -> Any:
    """Load a file's content, with a ``StoredTensor`` in place of each tensor.

    Args:
        path: A file that ``torch.save`` wrote, or that contains what it wrote.
        allowed: What stands for names that the file may contain besides those of torch's own, by
            ``module.name``: functions and classes that are safe to call.
        start: Where the archive begins in the file.
        size: Bytes of the archive; None: up to the end of the file.

    Raises:
        CheckpointError: The file is missing, cut off, another kind of archive, or would run code.
    """
    with open_to_read(path, CheckpointError) as stream:
        end = stream.seek(0, io.SEEK_END)
        size = end - start if size is None else size
        if not 0 <= start <= start + size <= end:
            what = f"ends at byte {end:,}, before byte {start + size:,}"
            raise CheckpointError(str(path), what, "Copy it again")
        part = _Part(stream, start, size)
        try:
            return _Archive(path, part).load(allowed or {})
        except zipfile.BadZipFile as error:
            what = "is not a complete zip archive, as torch.save writes it"
            remedy = "Copy it again, or save it with torch >= 1.6"
            raise CheckpointError(str(path), what, remedy) from error
        except _ForbiddenName as error:
            what = f"would run code when it is loaded ({error})"
            raise CheckpointError(str(path), what, REMEDY) from error
        except (OSError, pickle.UnpicklingError, RuntimeError, ValueError, LookupError) as error:
            what = f"cannot be read ({first_line(error)})"
            raise CheckpointError(str(path), what, REMEDY) from error


class _ForbiddenName(pickle.UnpicklingError):
    """The pickle asks for a function or class that is not allowed."""


class _Part(io.RawIOBase):
    """A part of a file as a file of its own, which refuses to read very much at once."""

    def __init__(self, stream: IO[bytes], start: int, size: int) -> None:
        self._stream, self.start, self._size, self._at = stream, start, size, 0
        self.most_at_once = LARGEST_PICKLE_BYTES

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "a place before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > self.most_at_once:
            raise ValueError(f"a part of {count:,} bytes should have {self.most_at_once:,}")
        self._stream.seek(self.start + self._at)
        found = self._stream.read(count)
        self._at += len(found)
        return found


class _Archive:
    """The zip archive of one ``torch.save``."""

    def __init__(self, path: Path, part: _Part) -> None:
        self._path, self._part = path, part
        part.most_at_once = LARGEST_DIRECTORY_BYTES  # an object for every 46 bytes of it
        with zipfile.ZipFile(part) as archive:
            self._records = {record.filename: record for record in archive.infolist()}
        part.most_at_once = LARGEST_PICKLE_BYTES
        pickles = [name for name in self._records if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl")
        self._pickle = pickles[0]
        self._prefix = self._pickle.removesuffix("data.pkl")

    def load(self, allowed: Mapping[str, Any]) -> Any:
        order = self._prefix + "byteorder"
        if order in self._records and self._read(order, 16) != b"little":
            raise ValueError("its numbers are not little-endian")

        def resolve(module: str, name: str) -> Any:
            return _resolve(module, name, allowed)

        content = self._read(self._pickle, LARGEST_PICKLE_BYTES)
        return BoundedUnpickler(content, resolve, self._find_storage).load()

    def _place(self, name: str) -> tuple[int, int]:
        """Where a record's bytes begin in the file, and how many they are."""
        record = self._records[name]
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted, which torch.save does not do")
        self._part.seek(record.header_offset)
        header = self._part.read(_LOCAL_HEADER_BYTES)
        if len(header) != _LOCAL_HEADER_BYTES or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        start = record.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        self._part.seek(0, io.SEEK_END)
        if start + record.file_size > self._part.tell():
            raise ValueError(f"it ends within {name}")
        return self._part.start + start, record.file_size

    def _read(self, name: str, limit: int) -> bytes:
        start, size = self._place(name)
        if size > limit:
            raise ValueError(f"{name} has {size:,} bytes, more than {limit:,}")
        self._part.seek(start - self._part.start)
        return self._part.read(size)

    def _find_storage(self, persistent_id: Any) -> "_StorageOfFile":
        kind, storage_type, key, _, elements = persistent_id
        if kind != "storage" or not isinstance(key, str) or not isinstance(elements, int):
            raise pickle.UnpicklingError("a persistent id is not that of a storage")
        if not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a storage has no type")
        start, size = self._place(f"{self._prefix}data/{key}")
        itemsize = storage_type.dtype.itemsize if storage_type.dtype else 1
        if elements < 0 or elements * itemsize != size:
            what = f"storage {key[:40]} has {size:,} bytes, its pickle says {elements * itemsize:,}"
            raise pickle.UnpicklingError(what)
        return _StorageOfFile(self._path, _Storage(storage_type.dtype, start, size))


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _StorageOfFile:
    path: Path
    storage: _Storage

    def tensor(self, dtype: Any, offset: Any, size: Any, stride: Any) -> StoredTensor:
        """A tensor whose elements are in the storage."""
        if not isinstance(dtype, torch.dtype) or not isinstance(offset, int):
            raise pickle.UnpicklingError("a tensor has no dtype or no place")
        shape, strides = _integers(size), _integers(stride)
        elements = prod(shape)
        if len(shape) != len(strides) or len(shape) > LARGEST_DIMS or elements > LARGEST_ELEMENTS:
            raise pickle.UnpicklingError("a tensor has an impossible shape")
        expected, is_contiguous = 1, True
        for length, step in zip(reversed(shape), reversed(strides), strict=True):
            is_contiguous &= elements == 0 or length == 1 or step == expected
            expected *= length
        if offset < 0 or (
            is_contiguous and (offset + elements) * dtype.itemsize > self.storage.size_bytes
        ):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        begin = self.storage.offset_bytes + offset * dtype.itemsize
        return StoredTensor(self.path, shape, dtype, begin, is_contiguous)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(
        type(v) is int and 0 <= v < 2**62 for v in values
    ):
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    return tuple(values)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    return storage.tensor(storage.storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    return storage.tensor(dtype, offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a subclass, or with attributes: the tensor alone."""
    if rebuild not in _REBUILD:
        raise pickle.UnpicklingError("a tensor is rebuilt by something else")
    return rebuild(*arguments)


def _size(values: Any = ()) -> tuple[int, ...]:
    return _integers(values)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    return dict(pairs)


def _set(values: Any = ()) -> set[Any]:
    return set(values)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes have another encoding")
    encoded: bytes = text.encode("latin1")
    return encoded


def _device(*place: Any) -> str:
    return ":".join(map(str, place))


DTYPES = {f"torch.{n}": dtype for n, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
"""All of torch's dtypes by the names under which they are pickled."""
_REBUILD: tuple[Callable[..., Any], ...] = (_rebuild_tensor, _rebuild_tensor_v3)
_TORCH_NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.storage.UntypedStorage": _StorageType(None),
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
    **{
        f"torch.{name}Storage": _StorageType(dtype)
        for name, dtype in {
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
            "ComplexFloat": torch.complex64,
            "ComplexDouble": torch.complex128,
        }.items()
    },
}


def _resolve(module: str, name: str, allowed: Mapping[str, Any]) -> Any:
    full = f"{module}.{name}"
    for names in (allowed, _TORCH_NAMES, DTYPES):
        if full in names:
            return names[full]
    raise _ForbiddenName(f"it asks for {full[:99]!r}")
