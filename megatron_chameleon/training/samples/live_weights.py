"""The current weights of a run, for code that otherwise reads them from a checkpoint."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow
from megatron_chameleon.config.parameters import qk_norm_groups, query_groups
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.model.tensor_shards import join_shards
from megatron_chameleon.parallel.topology import Topology


def gather_weights(
    parameters: Iterable[tuple[str, Tensor]], topology: Topology
) -> dict[str, Tensor]:
    """Whole tensors under their names in the whole model.

    A collective of the tensor-parallel ranks. The tensors may share memory with those of the
    model, so they must not be changed.

    Args:
        parameters: This rank's, with megatron-core's attributes; the model has one pipeline stage.
        topology: The place of this process.
    """
    whole = {}
    for name, parameter in parameters:
        dim = getattr(parameter, "partition_dim", -1)
        part = parameter.detach()
        if topology.tensor_size == 1 or dim < 0:
            whole[name] = part
            continue
        whole[name] = _gather_shards(name, part, dim, topology.tensor_size)
    return whole


def _gather_shards(name: str, part: Tensor, dim: int, size: int) -> Tensor:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return join_shards(parts, name, dim)


class LiveWeightsReader:
    """The current weights of a run behind the interface of a ``CheckpointReader``.

    Args:
        config: The run's.
        vocab_size: Number of tokens in the vocabulary.
        weights: From ``gather_weights``.
        step: The step that was just done, counted from 1.
    """

    format = "live"
    fingerprint: str | None = None
    has_optimizer = False
    weight_files: Collection[str] = ()
    data: dict[str, Any] | None = None
    skipped_steps: Sequence[int] = ()
    conversations: bool | None = None
    ema_updates = 0

    def __init__(
        self, config: Config, vocab_size: int, weights: dict[str, Tensor], step: int
    ) -> None:
        self.config: Config | None = config
        self.folder = Path(config.logging.run_dir)
        self.model: ModelConfig = config.model
        groups = qk_norm_groups(config.model)
        key_groups = min(groups, query_groups(config.model))
        self.dimensions = Dimensions.of(config.model, vocab_size, groups, key_groups)
        self.step = step
        self._weights = weights

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        return ()

    def dtype(self, row: TensorRow) -> torch.dtype:
        return self.read(row).dtype

    def read(self, row: TensorRow) -> Tensor:
        layer = "" if row.layer is None else f"layers.{row.layer}."
        return self._weights[row.megatron_name.replace("layers.", layer)]

    def tokenizer_folder(self, scratch: Path) -> Path:
        raise NotImplementedError("the run's tokenizer is in its config")

    def encoder(self) -> dict[str, Any]:
        return {}
