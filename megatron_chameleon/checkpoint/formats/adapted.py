"""An adapter and the weights that it belongs to, read as one model.

This is how a checkpoint of a run with an adapter, or a folder of ``peft``, is answered with,
measured and converted: each tensor gets what the adapter adds to it when it is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.adapters.adapter import Adapter
from megatron_chameleon.checkpoint.adapters.peft_folder import (
    CONFIG_FILE,
    is_peft_folder,
    read_peft_folder,
)
from megatron_chameleon.checkpoint.adapters.stored import (
    adapter_base,
    check_base,
    has_adapter,
    missing_base,
    read_stored_adapter,
)
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.megatron import recognise
from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.state.folders import trained_on_conversations
from megatron_chameleon.checkpoint.state.line import find_checkpoint
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.config.finetuning import AdapterConfig
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import why_no_folder

OpenBase = Callable[[Path], CheckpointReader]
_HAS_WEIGHTS = ("config.json", "params.json", "model.safetensors", "model.safetensors.index.json")


def find_adapter(folder: Path, *, ema: bool = False) -> Adapter | None:
    """The adapter that a path means; None if it means whole weights.

    Args:
        folder: A checkpoint, a run folder, a folder of ``peft``, or any other.
        ema: Whether the moving average of a training checkpoint stands for its numbers.

    Raises:
        CheckpointError: It is one, and cannot be read.
    """
    checkpoint = _training_checkpoint(folder)
    if checkpoint is not None:
        return read_stored_adapter(TrainingCheckpoint(checkpoint), ema=ema)
    if not is_peft_folder(folder) or any((folder / name).exists() for name in _HAS_WEIGHTS):
        return None
    if ema:
        remedy = "Leave out --ema"
        raise CheckpointError(str(folder), "is a folder of peft, which has no EMA", remedy)
    return read_peft_folder(folder)


def _training_checkpoint(folder: Path) -> Path | None:
    """The training checkpoint with an adapter that a path means."""
    if not recognise(folder):
        return None
    checkpoint = find_checkpoint(folder)
    return checkpoint if has_adapter(checkpoint) else None


class AdaptedReader:
    """Weights with an adapter in them. See ``formats.base.CheckpointReader``.

    Args:
        folder: Of the adapter, as ``find_adapter`` takes it.
        adapter: From there.
        open_base: Opens the base weights.
        base: Where the base weights are; None: where the adapter says.
    """

    format = "adapter"
    has_optimizer = False
    has_main_weights = True  # sums that are not rounded to the dtype of the base
    config: Config | None = None

    def __init__(
        self, folder: Path, adapter: Adapter, open_base: OpenBase, base: Path | None = None
    ) -> None:
        self.adapter = adapter
        checkpoint = _training_checkpoint(folder)
        self.folder = checkpoint or folder
        state: Mapping[str, Any] = {}
        if checkpoint is not None:
            state = TrainingCheckpoint(checkpoint).state
        recorded = adapter_base(dict(state), str(self.folder))
        place = base or (recorded[0] if recorded else self._named_base())
        if not place.is_dir():
            raise missing_base(place, str(self.folder))
        self.base = reader = open_base(place)
        if recorded:
            check_base(reader.folder, reader.weight_files, recorded[1], str(self.folder))
        self.model, self.dimensions = reader.model, reader.dimensions
        if checkpoint is not None:
            self._take_config(TrainingCheckpoint(checkpoint).config)
        self.weight_files = reader.weight_files
        self.image_config, self.token_ids = reader.image_config, reader.token_ids
        self.fingerprint = reader.fingerprint
        self.step = int(state.get("step", reader.step))
        self.ema_updates = int(state.get("ema_updates", 0))
        self.data = state.get("data")
        self.skipped_steps = state.get("skipped_steps", ())
        own = trained_on_conversations(state) if state else None
        self.conversations = reader.conversations if own is None else own
        rows = tensor_rows(reader.dimensions)
        shapes = (shape for row in rows for shape in row.hf_shapes.items())
        adapter.check(shapes, str(reader.folder))

    def _take_config(self, config: Config) -> None:
        """Take what the run of the adapter says of itself, such as its context and its data."""
        of_base = self.base.model
        self.model = replace(
            config.model,
            num_query_groups=of_base.num_query_groups,
            qk_norm_groups=of_base.qk_norm_groups,
        )
        # The weights that are read have the adapter in them.
        self.config = replace(config, adapter=AdapterConfig())

    def _named_base(self) -> Path:
        if not self.adapter.base:
            where = str(Path(self.adapter.where) / CONFIG_FILE)
            what = "does not say which weights it belongs to (base_model_name_or_path)"
            raise CheckpointError(where, what, "Write the folder of the weights there")
        place = Path(self.adapter.base)
        if not place.is_dir():
            what = f"base_model_name_or_path is {self.adapter.base}: {why_no_folder(place)}"
            remedy = (
                "Write the folder of the weights there, or run `chameleon convert --merge --base`"
            )
            raise CheckpointError(str(Path(self.adapter.where) / CONFIG_FILE), what, remedy)
        return place

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The base's."""
        return self.base.dtype(row)

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """None of them is stored."""
        return ()

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor with what the adapter adds to it."""
        tensor = self.base.read(replace(row, part=None))
        if row.part == MAIN_WEIGHT:
            tensor = tensor.float()
        if not any(name in self.adapter.pairs for name in row.hf_names):
            return tensor
        return row.to_megatron(self.adapter.merge(row.to_hf(tensor)))

    def tokenizer_folder(self, scratch: Path) -> Path:
        """The base's."""
        return self.base.tokenizer_folder(scratch)

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """The base's."""
        return self.base.encoder()
