"""A training checkpoint: megatron-core's distributed checkpoint (``torch_dist``) and a few files.

    .metadata, __N_0.distcp, common.pt, metadata.json   what dist_checkpointing.load reads
    config.yaml, state.json                             as ``checkpoint/state/save.py`` writes them
    tokenizer/                                          the tokenizer, in a converted checkpoint

If a converted checkpoint has weights only, its ``state.json`` says ``"optimizer": false``. If the
source had no training config, it says ``"training_config": false``, and ``config.yaml`` has default
values.
"""

import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.utils.serialization import config as serialization_config

from megatron_chameleon.checkpoint.formats.base import (
    RowStream,
    Target,
    TokenizerMissingError,
    check_names,
)
from megatron_chameleon.checkpoint.names.architecture import check_model
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.optimizer_state import (
    AVERAGE,
    MAIN_WEIGHT,
    MOMENTS,
    MOMENTUM,
    has_average,
    optimizer_key,
    optimizer_parts,
)
from megatron_chameleon.checkpoint.names.partial_state import layer_key
from megatron_chameleon.checkpoint.names.table import K_NORM, Q_NORM
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    STATE_FORMAT,
    STEP_FOLDER,
    trained_on_conversations,
)
from megatron_chameleon.checkpoint.state.line import find_checkpoint
from megatron_chameleon.checkpoint.state.reader import TensorInfo, TrainingCheckpoint
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config, TokenizerConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import write_text
from megatron_chameleon.tokenizer.common.files import tokenizer_file
from megatron_chameleon.tokenizer.folder import FINGERPRINTED_FILES
from megatron_chameleon.wording import shown

TOKENIZER_FOLDER = "tokenizer"
CHUNK_BYTES = 2**25
"""Larger tensors are stored as several chunks of rows, because torch copies a chunk to write it."""


def recognise(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint, a ``checkpoints`` folder or a run folder."""
    if (folder / STATE_FILE).is_file() or (folder / ".metadata").is_file():
        return True
    if (folder / "checkpoints").is_dir() or STEP_FOLDER.fullmatch(folder.name):
        return True
    return any(STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir())


class Reader:
    """A training checkpoint. See ``formats.base.CheckpointReader``.

    Args:
        folder: A checkpoint, or a ``checkpoints`` or run folder, of which the newest whole step is
            taken.
    """

    format = "megatron"
    image_config = None
    token_ids: Mapping[str, int] = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        self._checkpoint = TrainingCheckpoint(find_checkpoint(folder))
        state, found = self._checkpoint.state, self._checkpoint.tensors
        self.folder = self._checkpoint.folder
        self.weight_files = {"common.pt"}
        self.step = state["step"]
        self.fingerprint: str | None = state["tokenizer_fingerprint"]
        q_groups, k_groups = (_norm_groups(found, name) for name in (Q_NORM, K_NORM))
        model = self._checkpoint.config.model
        self.model = replace(
            model,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            qk_norm_groups=q_groups,
            train=[],  # what a run trained says nothing of the model
            freeze=[],
        )
        check_model(self.model, str(self.folder / "config.yaml"))
        self.dimensions = Dimensions.of(self.model, state["vocab_size"], q_groups, k_groups)
        has_config = state.get("training_config") is not False
        self.config: Config | None = self._checkpoint.config if has_config else None
        self.data: dict[str, Any] | None = state.get("data")
        self.skipped_steps: Sequence[int] = state.get("skipped_steps", ())
        self.conversations = trained_on_conversations(state)
        self.has_optimizer = self.has_main_weights = state.get("optimizer") is not False
        self._averages = self.has_optimizer and has_average(self._checkpoint.optimizer_tensors)
        self.ema_updates: int = state["ema_updates"] if self._averages else 0
        self._reads_average = False
        self._check()

    def read_average(self) -> None:
        """Let the moving average of the weights stand for the weights from now on, in fp32.

        Raises:
            CheckpointError: There is none.
        """
        if not self._averages:
            remedy = "Leave out --ema, or use a checkpoint of a run with training.ema_decay"
            raise CheckpointError(str(self.folder), "has no EMA of the weights", remedy)
        self._reads_average, self.has_optimizer, self.has_main_weights = True, False, False

    def _check(self) -> None:
        where, weights = str(self.folder), list(tensor_rows(self.dimensions))
        _check_tensors(where, self._checkpoint.tensors, weights)
        if self.has_optimizer:
            optimizer_rows = [
                replace(row, part=part)
                for row in weights
                for part in optimizer_parts(self.dtype(row), self.moments(row))
            ]
            found = self._checkpoint.optimizer_tensors
            if self._is_partly_trained():  # only what was trained has a state
                layered = [row for row in optimizer_rows if row.layer is not None]
                names = {layer_key(row.stored_name, row.layer or 0) for row in layered}
                found = {name: info for name, info in found.items() if name not in names}
                optimizer_rows = [row for row in optimizer_rows if row.stored_name in found]
            _check_tensors(where, found, optimizer_rows)

    def _is_partly_trained(self) -> bool:
        config = self._checkpoint.config
        return bool(config.model.train or config.model.freeze or config.adapter.rank)

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype of a stored weight, or of its average if that stands for it."""
        if self._reads_average:
            return torch.float32
        return self._checkpoint.tensors[row.megatron_name].dtype

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """AdamW's or Muon's, and the moving average if there is one."""
        momentum = optimizer_key(MOMENTUM, row.megatron_name)
        alone = layer_key(momentum, row.layer or 0)
        is_muon = any(name in self._checkpoint.optimizer_tensors for name in (momentum, alone))
        moments = (MOMENTUM,) if is_muon else MOMENTS
        return (*moments, AVERAGE) if self._averages else moments

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor, without padding rows of the vocabulary."""
        if self._reads_average and row.part is None:
            row = replace(row, part=AVERAGE)
        if row.part is not None and row.stored_name not in self._checkpoint.optimizer_tensors:
            return self._read_partly(row)
        return self._checkpoint.read(row.stored_name, row.layer)[: row.shape[0]]

    def _read_partly(self, row: TensorRow) -> torch.Tensor:
        """A part of the optimizer's state of which the checkpoint has only some layers, or none.

        What was not trained is its own main weight and average, and its moments are zero.
        """
        alone = layer_key(row.stored_name, row.layer or 0)
        if alone in self._checkpoint.optimizer_tensors:
            return self._checkpoint.read(alone)
        if row.part in (MAIN_WEIGHT, AVERAGE):
            weight = self._checkpoint.read(row.megatron_name, row.layer)[: row.shape[0]]
            return weight.float()
        return torch.zeros(row.shape)

    def tokenizer_folder(self, scratch: Path) -> Path:
        """The tokenizer folder in the checkpoint, or the one that its config names.

        Raises:
            TokenizerMissingError: The folder that the config names does not exist.
        """
        inside = self.folder / TOKENIZER_FOLDER
        path = inside if inside.is_dir() else Path(self._checkpoint.config.tokenizer.path)
        if not path.is_dir():
            raise TokenizerMissingError(
                str(self.folder / "config.yaml"),
                f"its tokenizer.path {shown(str(path))} is not a folder, seen from {Path.cwd()}",
                "Give the folder with --tokenizer",
            )
        return path

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Nothing: the fingerprint of the tokenizer says all."""
        return {}


def _norm_groups(found: Mapping[str, TensorInfo], name: str) -> int:
    """The groups of a QK-norm's tensor [layers, N, D]; 0 if there is none."""
    return found[name].shape[1] if name in found and len(found[name].shape) == 3 else 0


def _check_tensors(where: str, found: dict[str, TensorInfo], wanted: Sequence[TensorRow]) -> None:
    """Compare names and shapes with the config; the vocabulary may have padding rows."""
    expected, shapes = {}, {name: info.shape for name, info in found.items()}
    for row in wanted:
        name, dims = row.stored_name, row.dimensions
        expected[name] = row.shape if row.layer is None else (dims.num_layers, *row.shape)
        tokens, columns = shapes.get(name, ())[:1], shapes.get(name, ())[1:]
        is_vocabulary = row.layer is None and row.shape[0] == dims.vocab_size
        if is_vocabulary and columns == row.shape[1:] and tokens >= row.shape[:1]:
            shapes[name] = row.shape
    check_names(where, shapes, expected)


class Writer:
    """Writes a checkpoint without a process group. See ``formats.base.CheckpointWriter``."""

    holds: Collection[str] = (MAIN_WEIGHT, *MOMENTS, MOMENTUM, AVERAGE)

    def __init__(self, target: Target) -> None:
        self._target = target
        # one file per layer, one for what comes before the layers and one for what comes after
        groups: list[tuple[int | None, list[TensorRow]]] = []
        for row in target.rows:
            if not groups or groups[-1][0] != row.layer:
                groups.append((row.layer, []))
            groups[-1][1].append(row)
        self._files = {f"__{i}_0.distcp": group for i, (_, group) in enumerate(groups)}

    def files(self) -> dict[str, int]:
        """Files with tensors and their sizes, accurate to a few bytes."""
        return {
            file: sum(element_count(row.shape) * self._target.dtype(row).itemsize for row in group)
            for file, group in self._files.items()
        }

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything, and last ``state.json``, which makes the checkpoint whole."""
        from megatron.core.dist_checkpointing.core import CheckpointingConfig
        from megatron.core.dist_checkpointing.core import save_config as save_backend

        writer = _UnnamedFolderWriter(folder, thread_count=1, sync_files=False)
        writer.set_up_storage_writer(is_coordinator=True)
        tensors: dict[str, Any] = {}
        results = []
        for file, group in self._files.items():
            items = {item.index: item for row in group for item in self._chunks(row)}
            for item in items.values():
                data = item.tensor_data
                assert data is not None
                stored = TensorStorageMetadata(data.properties, data.size, [])
                tensors.setdefault(item.index.fqn, stored).chunks.append(data.chunk)
            empty = [item for row in group for item in self._empty_objects(row)]
            tensors.update({item.index.fqn: BytesStorageMetadata() for item in empty})
            plan = writer.prepare_local_plan(SavePlan([*items.values(), *empty]))
            (plan,) = writer.prepare_global_plan([plan])
            plan.storage_data.prefix = file.removesuffix("0.distcp")
            # torch ignores these checksums, and computing them takes as long as the writing
            with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                results.append(writer.write_data(plan, _StreamPlanner(stream)).wait())
        writer.finish(Metadata(tensors), results)
        torch.save({}, folder / "common.pt")
        save_backend(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
        self._write_beside(folder)

    def _chunks(self, row: TensorRow) -> Iterator[WriteItem]:
        """One layer's tensor as chunks of the tensor in which the layers are stacked."""
        dtype = self._target.dtype(row)
        stacked = row.layer is not None
        layers = (self._target.dimensions.num_layers,) if stacked else ()
        first = (row.layer,) if stacked else ()
        chunk_rows = max(1, CHUNK_BYTES // (element_count(row.shape[1:]) * dtype.itemsize))
        for start in range(0, row.shape[0], chunk_rows):
            rows = min(chunk_rows, row.shape[0] - start)
            offsets = torch.Size((*first, start, *(0 for _ in row.shape[1:])))
            sizes = torch.Size((*(1 for _ in layers), rows, *row.shape[1:]))
            yield WriteItem(
                index=MetadataIndex(row.stored_name, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(offsets, sizes),
                    TensorProperties(dtype=dtype),
                    torch.Size((*layers, *row.shape)),
                ),
            )

    def _empty_objects(self, row: TensorRow) -> Iterator[WriteItem]:
        """An empty object for each linear layer, without which megatron-core would not load it.

        Megatron-core stores Transformer Engine's FP8 state there; without FP8 it is empty.
        """
        name = row.megatron_name.removesuffix(".weight")
        is_linear = name.rpartition(".")[2].startswith("linear_")
        if row.layer is not None and row.part is None and is_linear:
            shard = f"shard_{row.layer}_{self._target.dimensions.num_layers}"
            index = MetadataIndex(f"{name}._extra_state/{shard}")
            yield WriteItem(index=index, type=WriteItemType.BYTE_IO)

    def _write_beside(self, folder: Path) -> None:
        target = self._target
        tokenizer = folder / TOKENIZER_FOLDER
        tokenizer.mkdir()
        for name in FINGERPRINTED_FILES:
            if (file := tokenizer_file(target.tokenizer.folder, name)).is_file():
                shutil.copyfile(file, tokenizer / name)
        config = deepcopy(target.config or Config())
        config.model = target.model
        config.tokenizer = TokenizerConfig(path=TOKENIZER_FOLDER)
        config.training.dtype = "bf16" if target.main_dtype is torch.bfloat16 else "fp32"
        save_config(config, folder / "config.yaml")
        state = {
            "format": STATE_FORMAT,
            "step": target.step,
            "optimizer": target.has_optimizer,
            "training_config": target.config is not None,
            "data": target.data,
            "skipped_steps": list(target.skipped_steps),
            "trained_on_conversations": target.conversations,
            "source": target.origin,
            "vocab_size": target.dimensions.vocab_size,
            "tokenizer_fingerprint": target.tokenizer.fingerprint,
        }
        if target.keeps_average:
            state["ema_updates"] = target.ema_updates
        write_text(folder / STATE_FILE, json.dumps(state, indent=1) + "\n", CheckpointError)


class _UnnamedFolderWriter(FileSystemWriter):
    """torch's writer, without the metadata that names the temporary folder."""

    def storage_meta(self) -> None:
        return None


class _StreamPlanner(SavePlanner):
    """Gives torch's writer the chunks in the order of its plan, from one tensor at a time."""

    def __init__(self, stream: RowStream) -> None:
        self._stream = stream
        self._rows_left = torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The next chunk of the tensor that is being written, or the first of the next tensor."""
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        data = write_item.tensor_data
        assert data is not None
        if not len(self._rows_left):
            row, self._rows_left = next(self._stream)
            assert row.stored_name == write_item.index.fqn
        stacked = len(data.chunk.sizes) > self._rows_left.dim()
        rows = data.chunk.sizes[1 if stacked else 0]
        chunk, self._rows_left = self._rows_left[:rows], self._rows_left[rows:]
        return chunk.contiguous().view(data.chunk.sizes)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError
