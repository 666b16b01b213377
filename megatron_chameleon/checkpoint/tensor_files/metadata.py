"""Read ``.metadata``, the index of a ``torch_dist`` checkpoint, and check what it says.

It is a pickle, which torch and megatron-core load without any restriction. Here it may contain a
fixed list of classes only, within the bounds of ``tensor_files/pickles.py``. What it says about
shapes, chunks and files is checked before anything is built from it.
"""

import pickle
from enum import EnumMeta
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_chameleon.checkpoint.tensor_files.pickles import BoundedUnpickler
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import DTYPES
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.files import read_bytes
from megatron_chameleon.values import describe

METADATA_FILE = ".metadata"
LARGEST_METADATA_BYTES = 128 << 20
LARGEST_OBJECT_BYTES = 640 << 20
"""Most memory for what it says, by an estimate: 500 MiB for 100,000 chunks."""
LARGEST_DIMS = 16
_REMEDY = "Use another step"
_COPY_REMEDY = "Copy the whole folder, or use another step"
_NAMES: dict[str, Any] = {
    **DTYPES,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module, names in {
            filesystem: ("_StorageInfo",),
            torch_metadata: (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            ),
            planner: (
                "BytesIOWriteData",
                "SavePlan",
                "TensorWriteData",
                "WriteItem",
                "WriteItemType",
            ),
        }.items()
        for name in names
    },
}


def _member(kind: Any, name: Any) -> Any:
    """A member of an enumeration, which Python 3.11.2, Debian 12's, stores as ``getattr``."""
    if not (isinstance(kind, EnumMeta) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError("it asks for 'builtins.getattr' of what is no enumeration")
    return kind.__members__[name]


_NAMES["builtins.getattr"] = _member


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's index.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged, or contains or names what no checkpoint has;
            or data files are missing or too short.
    """
    path = folder / METADATA_FILE
    content = read_bytes(path, CheckpointError, LARGEST_METADATA_BYTES)
    try:
        metadata = BoundedUnpickler(content, _resolve, None, LARGEST_OBJECT_BYTES).load()
        _check(metadata, folder)
    except (pickle.UnpicklingError, _Wrong) as error:
        what = f"cannot be read ({first_line(error)})"
        raise CheckpointError(str(path), what, _REMEDY) from error
    except (AttributeError, TypeError, OSError) as error:
        what = f"is damaged ({type(error).__name__}: {first_line(error)[:200]})"
        raise CheckpointError(str(path), what, _REMEDY) from error
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    found: Metadata = metadata
    return found


class _Wrong(Exception):
    """What the index says cannot be."""


def _resolve(module: str, name: str) -> Any:
    found = _NAMES.get(f"{module}.{name}")
    if found is None:
        what = f"it asks for {describe(f'{module}.{name}')}, which no checkpoint needs"
        raise pickle.UnpicklingError(what)
    return found


def _file_sizes(metadata: Any, folder: Path) -> dict[str, int]:
    """The size of each data file.

    Raises:
        CheckpointError: One of them is missing, or is outside the folder.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise _Wrong(f"it holds {describe(metadata)}, not the index of a checkpoint")
    sizes: dict[str, int] = {}
    missing = []
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise _Wrong(f"it names the file {describe(name)}, which is not in the folder")
        if name not in sizes:
            path = folder / name
            sizes[name] = path.stat().st_size if path.is_file() else -1
            missing += [name] if sizes[name] < 0 else []
    if missing:
        raise CheckpointError(
            str(folder),
            f"{len(missing)} of {len(sizes)} data files are missing, the first is {min(missing)}",
            _COPY_REMEDY,
        )
    return sizes


def _check(metadata: Metadata, folder: Path) -> None:
    """Check shapes, chunks and places.

    Raises:
        _Wrong: Something cannot be.
        CheckpointError: A data file is missing or too short.
    """
    sizes = _file_sizes(metadata, folder)
    if not isinstance(metadata.state_dict_metadata, dict):
        raise _Wrong("it has no list of tensors")
    for info in metadata.storage_data.values():
        end = sizes[info.relative_path]
        numbers = (info.offset, info.length)
        if not all(type(n) is int and n >= 0 for n in numbers):
            place = f"{describe(info.offset)} + {describe(info.length)}"
            raise _Wrong(f"a chunk is at {place} of {info.relative_path}")
        if sum(numbers) > end:
            what = f"has {end:,} bytes, but a chunk of it ends at {sum(numbers):,}"
            raise CheckpointError(str(folder / info.relative_path), what, _COPY_REMEDY)
    stored_bytes = 0
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not name.isprintable():
            raise _Wrong("the name of a tensor is not a line of text")
        if isinstance(item, TensorStorageMetadata):
            stored_bytes += _check_tensor(name, item)
            for chunk in item.chunks:
                if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                    at = list(chunk.offsets)
                    raise _Wrong(f"it does not say where the chunk of {describe(name)} at {at} is")
        elif not isinstance(item, BytesStorageMetadata):
            raise _Wrong(f"{describe(name)} is {describe(item)}, not a tensor")
    if stored_bytes > sum(sizes.values()):
        what = f"its tensors have {stored_bytes:,} bytes, the files {sum(sizes.values()):,}"
        raise _Wrong(what)


def _check_tensor(name: str, item: TensorStorageMetadata) -> int:
    """The bytes of a tensor's chunks, which must lie within it."""
    shape, dtype = item.size, item.properties.dtype
    if not _is_shape(shape) or not isinstance(dtype, torch.dtype):
        raise _Wrong(f"{describe(name)} has an impossible shape or dtype")
    elements = 0
    if not isinstance(item.chunks, list):
        raise _Wrong(f"{describe(name)} has no chunks")
    for chunk in item.chunks:
        is_chunk = isinstance(chunk, ChunkStorageMetadata)
        if not is_chunk or not _is_shape(chunk.offsets) or not _is_shape(chunk.sizes):
            raise _Wrong(f"a chunk of {describe(name)} has an impossible shape")
        if len({len(shape), len(chunk.offsets), len(chunk.sizes)}) > 1 or any(
            start + length > end
            for start, length, end in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise _Wrong(f"a chunk of {describe(name)} lies outside it")
        elements += prod(chunk.sizes)
    return elements * dtype.itemsize


def _is_shape(sizes: Any) -> bool:
    is_tuple = isinstance(sizes, tuple) and len(sizes) <= LARGEST_DIMS
    return is_tuple and all(type(size) is int and 0 <= size < 2**48 for size in sizes)
