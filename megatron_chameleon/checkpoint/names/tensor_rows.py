"""The rows of the table for one model, layer by layer: what a conversion moves.

    for row in tensor_rows(dimensions):
        tensors = row.to_hf(checkpoint.read(row.megatron_name, row.layer))
        again = row.to_megatron(tensors)

Meta's shards are made from HF's tensors: ``zip(row.meta, tensors.values())`` pairs each
``MetaTensor`` with the tensor that its ``to_shards`` takes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_chameleon.checkpoint.names.mappings import (
    K_NORM_GROUPS,
    Q_NORM_GROUPS,
    Dimensions,
    TensorMapping,
)
from megatron_chameleon.checkpoint.names.meta_shards import MetaTensor
from megatron_chameleon.checkpoint.names.optimizer_state import optimizer_key
from megatron_chameleon.checkpoint.names.table import TABLE, RowTemplate


@dataclass(frozen=True)
class TensorRow:
    """One row of the table for one layer: the unit that a conversion moves.

    Attributes:
        megatron_name: Megatron-core's name of the weight.
        layer: 0-based; None for a tensor outside the layers.
        hf_names: HF's names, in the order of the mapping.
        meta: Meta's tensor for each of HF's, with the layer's number in its name.
        mapping: How megatron-core's tensor becomes HF's.
        dimensions: The model's sizes.
        part: None for the weight itself; otherwise the part of its optimizer state that this row
            is about (``MAIN_WEIGHT`` or one of ``MOMENTS``), which has the weight's shape and
            mapping.
    """

    megatron_name: str
    layer: int | None
    hf_names: tuple[str, ...]
    meta: tuple[MetaTensor, ...]
    mapping: TensorMapping
    dimensions: Dimensions
    part: str | None = None

    @property
    def key(self) -> str:
        """The name in messages and checksums: ``decoder.layers.mlp.linear_fc1.weight[3]``."""
        name = self.stored_name
        return name if self.layer is None else f"{name}[{self.layer}]"

    @property
    def stored_name(self) -> str:
        """The name in a training checkpoint."""
        return optimizer_key(self.part, self.megatron_name) if self.part else self.megatron_name

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of HF's tensors by name."""
        parts = self.to_hf(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in parts.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Megatron-core's shape of this layer, without vocabulary padding."""
        return self.mapping.shape(self.dimensions)

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """HF's tensors by name; padding rows of the vocabulary are cut off.

        Args:
            tensor: ``shape``, or more rows where the vocabulary is padded.
        """
        parts = self.mapping.split(tensor[: self.shape[0]], self.dimensions)
        return dict(zip(self.hf_names, parts, strict=True))

    def to_megatron(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of ``to_hf``: [``shape``], without vocabulary padding.

        Raises:
            CheckpointError: The QK-norms differ between heads that should share one.
        """
        return self.mapping.join([tensors[name] for name in self.hf_names], self.dimensions)


def tensor_rows(dimensions: Dimensions) -> Iterator[TensorRow]:
    """Every row of a model, in the order of the forward pass.

    A model with 0 QK-norm groups has no rows for QK-norms.
    """
    templates = [row for row in TABLE if row.norm_order in (None, dimensions.norm_order)]
    if not dimensions.q_norm_groups:
        templates = [row for row in templates if row.mapping not in (Q_NORM_GROUPS, K_NORM_GROUPS)]
    layered = [row for row in templates if "{layer}" in row.hf[0]]
    first = templates.index(layered[0])
    for template in templates[:first]:
        yield _fill_in(template, None, dimensions)
    for layer in range(dimensions.num_layers):
        for template in layered:
            yield _fill_in(template, layer, dimensions)
    for template in templates[first + len(layered) :]:
        yield _fill_in(template, None, dimensions)


def _fill_in(template: RowTemplate, layer: int | None, dimensions: Dimensions) -> TensorRow:
    return TensorRow(
        megatron_name=template.megatron,
        layer=layer,
        hf_names=tuple(name.format(layer=layer) for name in template.hf),
        meta=tuple(replace(m, name=m.name.format(layer=layer)) for m in template.meta),
        mapping=template.mapping,
        dimensions=dimensions,
    )
