"""Read a training checkpoint tensor by tensor, without a process group and without a model.

It needs memory for one tensor at a time. A checkpoint folder has megatron-core's ``torch_dist``
format, which is PyTorch's distributed-checkpoint format: a ``.metadata`` file that says which chunk
of which tensor is where, and ``__R_N.distcp`` files with the chunks. Beside them are
``config.yaml`` and, written last, ``state.json``, without which the checkpoint is not whole.

The content does not depend on the engine, optimizer and layout that wrote it:

    NAME                                a weight, in the dtype that the run computes with
    optimizer.state.fp32_param.NAME     its fp32 main weight, where the weight is not fp32 itself
    optimizer.state.exp_avg.NAME        AdamW's moments, fp32
    optimizer.state.exp_avg_sq.NAME
    state.json                          the step, which is AdamW's step too

Try: ``TrainingCheckpoint(find_checkpoint("runs/digits")).read("output_layer.weight")``
"""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_chameleon.checkpoint.names.optimizer_state import OPTIMIZER_PREFIX
from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config, load_state
from megatron_chameleon.checkpoint.tensor_files.pth import StoredTensor
from megatron_chameleon.checkpoint.tensor_files.raw import empty_tensor, read_into
from megatron_chameleon.errors import CheckpointError

MODEL_PREFIX = "model."

_METADATA_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
    }
)


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a stored tensor, whatever layout it was saved from."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TrainingCheckpoint:
    """An opened training checkpoint, whose tensors are read one by one.

    Args:
        folder: A whole ``step_...`` folder (see ``find_checkpoint``).

    Attributes:
        state: The content of ``state.json``.
        config: The resolved training config.
        tensors: Shape and dtype of every tensor outside the optimizer, by megatron-core's name,
            without a prefix ``model.``. Layers are stacked: the first dim of a ``decoder.layers.``
            tensor is the layer.
        optimizer_tensors: The same for the optimizer's tensors, by the names above.
        names: The full names of everything that is stored.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.state = load_state(self.folder)
        self.config = load_checkpoint_config(self.folder)
        self._storage = _SafeReader(self.folder)
        self._metadata = _read_metadata(self._storage, self.folder)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.names = frozenset(self._metadata.state_dict_metadata)
        self._stored = {
            name.removeprefix(MODEL_PREFIX): (name, item)
            for name, item in self._metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        found = {
            name: TensorInfo(tuple(item.size), item.properties.dtype)
            for name, (_, item) in self._stored.items()
        }
        self.optimizer_tensors = {n: t for n, t in found.items() if n.startswith(OPTIMIZER_PREFIX)}
        self.tensors = {n: t for n, t in found.items() if n not in self.optimizer_tensors}

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """One tensor, or one layer's part of a stacked tensor, on the CPU.

        Args:
            name: A key of ``tensors`` or ``optimizer_tensors``.
            layer: Index into the first dim, 0-based; None reads the whole tensor.

        Raises:
            CheckpointError: There is no such tensor, or its file is missing or damaged.
        """
        info = self.tensors.get(name) or self.optimizer_tensors.get(name)
        if info is None:
            what = f"there is no tensor {name}"
            raise CheckpointError(str(self.folder), what, "Use another checkpoint")
        key, stored = self._stored[name]
        first = 0 if layer is None else layer
        shape = info.shape if layer is None else (1, *info.shape[1:])
        chunk = ChunkStorageMetadata(
            offsets=torch.Size([first, *[0] * (len(shape) - 1)][: len(shape)]),
            sizes=torch.Size(shape),
        )
        target = empty_tensor(shape, info.dtype)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        read_elements = sum(item.lengths.numel() for item in items)
        if read_elements != target.numel():
            raise CheckpointError(
                str(self.folder),
                f"{name} has {read_elements} of {target.numel()} elements in its files",
                "Use another step",
            )
        for item in items:
            self._read_item(name, item, target)
        return target if layer is None else target[0]

    def _read_item(self, name: str, item: ReadItem, target: torch.Tensor) -> None:
        """Copy the wanted part of a chunk into its place, straight from the file where possible."""
        ranges = zip(item.dest_offsets, item.lengths, strict=True)
        place = target[tuple(slice(start, start + length) for start, length in ranges)]
        info = self._metadata.storage_data[item.storage_index]
        path = self.folder / info.relative_path
        found = self._find(name, path, info)
        is_whole = (tuple(place.shape), place.dtype) == (found.shape, found.dtype)
        tensor = place
        if not is_whole or not place.is_contiguous():
            tensor = empty_tensor(found.shape, found.dtype)
        read_into(tensor, path, found.offset_bytes, name)
        if tensor is not place:
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                tensor = tensor.narrow(dim, start, length)
            place.copy_(tensor)

    def _find(self, name: str, path: Path, info: Any) -> StoredTensor:
        """Find where a chunk's numbers begin in a file: each chunk is an archive of its own."""
        remedy = "Use another step"
        if info.transform_descriptors:
            what = "is compressed, which this version cannot read"
            raise CheckpointError(str(path), what, remedy)
        try:
            with path.open("rb") as stream:
                archive = cast(IO[bytes], _create_file_view(stream, info.offset, info.length))
                chunk = torch.load(archive, map_location="meta", weights_only=True)
            found = StoredTensor.find(path, name, chunk)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"cannot read {name} ({reason})"
            raise CheckpointError(str(self.folder), what, remedy) from error
        return replace(found, offset_bytes=info.offset + found.offset_bytes)


class _SafeReader(FileSystemReader):
    """PyTorch's reader, except that ``.metadata`` may only contain a fixed list of classes.

    PyTorch already reads the chunks with ``weights_only=True``, but ``.metadata`` is a plain
    pickle, which could run any code.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _read_metadata(storage: FileSystemReader, folder: Path) -> Metadata:
    try:
        metadata = storage.read_metadata()
        files = {info.relative_path for info in metadata.storage_data.values()}
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise CheckpointError(
            str(folder / ".metadata"), f"cannot be read ({error})", "Use another step"
        ) from error
    missing = sorted(name for name in files if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            str(folder),
            f"{len(missing)} of {len(files)} data files are missing, the first is {missing[0]}",
            "Copy the whole folder, or use another step",
        )
    return metadata
