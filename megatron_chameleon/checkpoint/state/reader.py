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
    optimizer.state.momentum_buffer.NAME  Muon's momentum, in place of them
    optimizer.state.ema.NAME            its moving average, fp32, with training.ema_decay
    state.json                          the step, which is AdamW's step too

Try: ``TrainingCheckpoint(find_checkpoint("runs/digits")).read("output_layer.weight")``
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_chameleon.checkpoint.names.optimizer_state import OPTIMIZER_PREFIX
from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config, load_state
from megatron_chameleon.checkpoint.tensor_files.metadata import read_metadata
from megatron_chameleon.checkpoint.tensor_files.raw import empty_tensor, read_into
from megatron_chameleon.checkpoint.tensor_files.torch_pickles import (
    StoredTensor,
    load_without_data,
)
from megatron_chameleon.errors import CheckpointError

MODEL_PREFIX = "model."


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
        self._metadata = read_metadata(self.folder)
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
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        read_elements = sum(item.lengths.numel() for item in items)
        if read_elements != chunk.sizes.numel():
            raise CheckpointError(
                str(self.folder),
                f"{name} has {read_elements} of {chunk.sizes.numel()} elements in its files",
                "Use another step",
            )
        target = empty_tensor(shape, info.dtype)
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
        ends = (s + n for s, n in zip(item.storage_offsets, item.lengths, strict=True))
        if len(found.shape) != len(item.lengths) or any(
            end > size for end, size in zip(ends, found.shape, strict=True)
        ):
            what = f"a chunk of {name} is {list(found.shape)}, not what the index says"
            raise CheckpointError(str(path), what, "Use another step")
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
        chunk = load_without_data(path, start=info.offset, size=info.length)
        if not isinstance(chunk, StoredTensor):
            raise CheckpointError(str(path), f"cannot read {name} (it is not a tensor)", remedy)
        return chunk.check(name)
