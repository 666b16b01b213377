"""Write and read safetensors files tensor by tensor.

The safetensors library writes a file only from tensors that are all in memory. Here the header,
which is known before the tensors are, is written first, and each tensor goes to its place when it
arrives. Format: 8 bytes with the header's length, the header in JSON, the tensors' bytes without
gaps. Source: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.tensor_files.raw import (
    as_bytes,
    element_count,
    empty_tensor,
    read_into,
)
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.files import open_to_read, read_json_object, write_text
from megatron_chameleon.values import LARGEST_COUNT, Values, describe, printable

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LARGEST_HEADER_BYTES = 16 << 20
"""A file with 10,000 tensors has a header of 1.5 MB."""
LARGEST_DIMS = 16
_COPY_REMEDY = "Copy the whole folder again"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return element_count(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes tensors into one or more files as they arrive, in any order.

    Args:
        specs: All tensors; they are distributed over the files in this order.
        shard_bytes: Most bytes of tensors in a file; a single larger tensor gets its own file.

    Attributes:
        files: Names and sizes in bytes of the files.
    """

    def __init__(self, specs: Sequence[TensorSpec], shard_bytes: int) -> None:
        groups: list[list[TensorSpec]] = [[]]
        held_bytes = 0
        for spec in specs:
            if groups[-1] and held_bytes + spec.size_bytes > shard_bytes:
                groups.append([])
                held_bytes = 0
            groups[-1].append(spec)
            held_bytes += spec.size_bytes
        self._specs = {spec.name: spec for spec in specs}
        self._places: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, bytes] = {}
        self.files: dict[str, int] = {}
        for index, group in enumerate(groups):
            file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(SINGLE_FILE if len(groups) == 1 else file, group)

    def _lay_out(self, file: str, group: list[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # the widest first, so that every tensor is aligned
        for spec in sorted(group, key=lambda spec: -spec.dtype.itemsize):
            begin, end = end, end + spec.size_bytes
            header[spec.name] = {
                "dtype": _DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        data_starts = len(self._headers[file])
        for spec in group:
            self._places[spec.name] = (file, data_starts + header[spec.name]["data_offsets"][0])
        self.files[file] = data_starts + end

    def start(self, folder: Path) -> None:
        """Create the files, in full size but without data, and the index."""
        self._folder = folder
        self._missing = set(self._specs)
        for file, size_bytes in self.files.items():
            with (folder / file).open("wb") as stream:
                stream.write(self._headers[file])
                stream.truncate(size_bytes)
        if len(self.files) > 1:
            total_bytes = sum(spec.size_bytes for spec in self._specs.values())
            weight_map = {name: file for name, (file, _) in self._places.items()}
            content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_text(folder / INDEX_FILE, json.dumps(content, indent=1), CheckpointError)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place."""
        spec = self._specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        file, offset = self._places[name]
        with (self._folder / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(as_bytes(tensor))
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that every tensor has been written."""
        assert not self._missing, sorted(self._missing)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    file: str
    offset_bytes: int


class SafetensorsReader:
    """Reads the tensors of a folder of safetensors files one by one, with or without an index.

    The headers are read here and not by the safetensors library, which maps whole files into
    memory: what has been read would stay there, and a file that becomes shorter would end the
    process.

    Args:
        folder: The folder.
        single: Name of the only file, which has no index then; None: that of a model.

    Attributes:
        shapes: The shape of each tensor by its name.
        dtypes: The dtype of each tensor by its name.
        names: The names of the files.

    Raises:
        CheckpointError: A file is missing or damaged, or the index does not match the files.
    """

    def __init__(self, folder: Path, single: str | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, _Place] = {}
        index = folder / INDEX_FILE
        files = self._read_index() if single is None and index.exists() else None
        only = frozenset({single or SINGLE_FILE})
        self.names = only if files is None else frozenset(files.values())
        self._check_files()
        for file in sorted(self.names):
            self._read_header(file, files)
        for name, file in (files or {}).items():
            if name not in self.shapes:
                raise CheckpointError(
                    str(index),
                    f"says that {printable(name)} is in {file}, where it is not",
                    _COPY_REMEDY,
                )

    def _check_files(self) -> None:
        """Say how many files are missing, which is more than that the first one is."""
        missing = sorted(n for n in self.names if not os.path.lexists(self.folder / n))
        if not missing:
            return
        what = f"{len(missing)} of the {len(self.names)} files with weights are missing, such as "
        what += missing[0]
        if len(self.names) == 1:
            what = f"has no {missing[0]}"
            others = sorted(path.name for path in self.folder.glob("*.bin"))
            if others:
                what += (
                    f", and {others[0]}, as older versions of transformers write it, is not read"
                )
        raise CheckpointError(str(self.folder), what, "Fetch or copy the whole folder again")

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        content = read_json_object(index, CheckpointError, LARGEST_HEADER_BYTES)
        files = content.get("weight_map")
        if not isinstance(files, dict):
            what = f"is not an index of safetensors files: weight_map is {describe(files)}"
            raise CheckpointError(str(index), what, "Copy it again")
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
                what = f"names {describe(file)} for {printable(name)}, which is not in the folder"
                raise CheckpointError(str(index), what, _COPY_REMEDY)
        return files

    def _read_header(self, file: str, files: dict[str, str] | None) -> None:
        path = self.folder / file
        header, data_starts, data_bytes = _load_header(path)
        end = 0
        entries = ((name, _entry(path, name, value)) for name, value in header.items())
        for name, (dtype, shape, begin, stop) in sorted(entries, key=lambda e: e[1][2:]):
            if files is not None and files.get(name) != file:
                elsewhere = files.get(name)
                place = f"places in {elsewhere}" if elsewhere else "does not list"
                what = f"holds {printable(name)}, which the index {place}"
                raise CheckpointError(str(path), what, _COPY_REMEDY)
            if begin != end or stop - begin != element_count(shape) * dtype.itemsize:
                size = f"{list(shape)} of {str(dtype).removeprefix('torch.')}"
                what = f"{printable(name)}, {size}, is at {begin:,} to {stop:,}"
                raise _damaged(path, f"{what}, the one before it ends at {end:,}")
            end = stop
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._places[name] = _Place(file, data_starts + begin)
        if end != data_bytes:
            raise _damaged(path, f"its tensors end at {end:,} of {data_bytes:,} bytes")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU.

        Raises:
            CheckpointError: The file ends too early.
        """
        place = self._places[name]
        tensor = empty_tensor(self.shapes[name], self.dtypes[name])
        return read_into(tensor, self.folder / place.file, place.offset_bytes, name)


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The tensors of a file, where their bytes begin, and how many bytes there are."""
    with open_to_read(path, CheckpointError) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER_BYTES):
            most = f"{max(0, size - 8):,} bytes follow, {LARGEST_HEADER_BYTES:,} are allowed"
            raise _damaged(path, f"its header has {length:,} bytes, {most}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {first_line(error)[:200]}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is {describe(header)}")
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(twice)} occurs twice")
    return content


def _entry(path: Path, name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and where its bytes begin and end."""
    remedy = "Use an unquantised checkpoint"
    values = Values(value if isinstance(value, dict) else {}, f"{path}: {printable(name)}", remedy)
    dtype = _TORCH_DTYPES.get(values.text("dtype"))
    if dtype is None:
        what = f"{printable(name)} is {values.text('dtype', longest=99)}; supported are "
        raise CheckpointError(str(path), what + ", ".join(_TORCH_DTYPES), remedy)
    shape = tuple(values.wholes("shape", high=LARGEST_COUNT, most=LARGEST_DIMS))
    offsets = values.wholes("data_offsets", high=LARGEST_COUNT, most=2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise values.error(f"data_offsets is {offsets}, not where it begins and ends")
    return dtype, shape, offsets[0], offsets[1]


def _damaged(path: Path, reason: str) -> CheckpointError:
    what = f"is damaged or not a safetensors file ({reason})"
    return CheckpointError(str(path), what, "Copy it again")
