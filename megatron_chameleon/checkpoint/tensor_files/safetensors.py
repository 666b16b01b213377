"""Write and read safetensors files tensor by tensor.

The safetensors library writes a file only from tensors that are all in memory. Here the header,
which is known before the tensors are, is written first, and each tensor goes to its place when it
arrives. Format: 8 bytes with the header's length, the header in JSON, the tensors' bytes without
gaps. Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes, element_count
from megatron_chameleon.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
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
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

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


class SafetensorsReader:
    """Reads the tensors of a folder of safetensors files one by one, with or without an index.

    Attributes:
        shapes: The shape of each tensor by its name.
        dtypes: The dtype of each tensor by its name.

    Raises:
        CheckpointError: A file is missing or damaged, or the index does not match the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files = self._read_index()
        for file in sorted(set(self._files.values())):
            self._read_header(file)
        for name, file in self._files.items():
            if name not in self.shapes:
                raise CheckpointError(
                    str(folder / INDEX_FILE),
                    f"says that {name} is in {file}, where it is not",
                    "Copy the whole folder again",
                )

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            with self._open(SINGLE_FILE) as file:
                return dict.fromkeys(file.keys(), SINGLE_FILE)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                str(index), f"is not an index of safetensors files ({error!r})", "Copy it again"
            ) from error
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                what = f"names {file!r}, which is not in the folder"
                raise CheckpointError(str(index), what, "Copy the whole folder again")
        return files

    def _read_header(self, file: str) -> None:
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a mapping)
                if self._files.get(name) != file:
                    elsewhere = self._files.get(name)
                    raise CheckpointError(
                        str(self.folder / file),
                        f"holds {name}, which the index "
                        + (f"places in {elsewhere}" if elsewhere else "does not list"),
                        "Copy the whole folder again",
                    )
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _TORCH_DTYPES:
                    what = f"{name} is {dtype}; supported are {', '.join(_TORCH_DTYPES)}"
                    raise CheckpointError(
                        str(self.folder / file), what, "Use an unquantised checkpoint"
                    )
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _TORCH_DTYPES[dtype]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU.

        The file is opened for this tensor alone: it is mapped into memory, and what has been read
        would stay there for as long as it is open.
        """
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(str(path), "no such file", "Copy the whole folder again")
        try:
            with safe_open(path, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                str(path), f"is damaged or not a safetensors file ({reason})", "Copy it again"
            ) from error
