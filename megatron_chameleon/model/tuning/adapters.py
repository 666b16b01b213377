"""Low-rank adapters (LoRA, DoRA) beside the linear layers of each transformer layer.

    y = W x + alpha / rank * B A x            LoRA, arXiv 2106.09685
    y = m / |W'| * (W' x)                     DoRA, arXiv 2402.09353; W' = W + alpha / rank * B A

W is frozen. A [rank, in] and B [out, rank] exist for each linear layer of the exported Hugging Face
model, also where megatron-core has several of them in one matrix, so that an adapter is the same
numbers in either. An adapter is a module beside the layer that it adds to, and a hook of that layer
calls it, so no weight of the model changes its name or place.

Tensor parallelism splits B of a column-parallel layer by its rows, and A of a row-parallel one by
its columns, as it splits W. The other matrix is on every rank. Between the two, where a token has
only ``rank`` numbers, the ranks exchange what the layer itself would exchange.

Letters in tensor names: S sequence, B batch, I and O the layer's input and output of this rank, R
rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.checkpoint.names.adapters import MAGNITUDE, SITES, A, B
from megatron_chameleon.config.finetuning import AdapterConfig
from megatron_chameleon.config.schema import Config
from megatron_chameleon.model.quantized.linear import whole_weight


@dataclass(frozen=True)
class _Split:
    """How a layer's matrix is split over the tensor-parallel ranks."""

    by_rows: bool
    """Whether each rank has a part of the output (column-parallel), or of the input."""
    sequence: bool
    """Whether sequence parallelism splits the tokens outside the layer."""
    rank: int
    size: int


class LinearAdapter(nn.Module):
    """The adapters of one of megatron-core's linear layers.

    Args:
        config: What an adapter is like.
        linear: The layer, whose weight is [O, I], in 4 bits or not.
        outputs: How many of the rows of the whole matrix belong to each of the Hugging Face layers
            that are joined in it, in their order.
        groups: Number of blocks that this rank's rows consist of; each has a part of every Hugging
            Face layer.
        split: How the matrix is split.
    """

    def __init__(
        self,
        config: AdapterConfig,
        linear: nn.Module,
        outputs: Mapping[str, int],
        groups: int,
        split: _Split,
    ) -> None:
        super().__init__()
        weight = whole_weight(linear)
        self._linear = [linear]  # in a list, so that it does not become a submodule
        self._split, self._groups = split, groups
        self._scale, self._dropout = config.alpha / config.rank, config.dropout
        share = split.size if split.by_rows else 1
        self._outputs = {name: rows // share for name, rows in outputs.items()}
        self.names = tuple(name for name in outputs if name in config.target_modules)
        self.has_magnitude = config.dora
        for name in self.names:
            rows = self._outputs[name]
            self._add(f"{name}_{A}", (config.rank, weight.shape[1]), weight, 1)
            self._add(f"{name}_{B}", (rows, config.rank), weight, 0)
            if config.dora:
                self._add(f"{name}_{MAGNITUDE}", (rows,), weight, 0)

    def _add(self, name: str, shape: tuple[int, ...], weight: Tensor, dim: int) -> None:
        parameter = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        split = self._split
        if dim == (0 if split.by_rows else 1):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        elif split.sequence:
            # Each rank computes the gradient of its part of the tokens only.
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def forward(self, x_SBI: Tensor, base_SBO: Tensor) -> Tensor:
        """The layer's output with its adapters.

        Args:
            x_SBI: The layer's input.
            base_SBO: Its output without them.
        """
        parts_SBO = dict(zip(self.names, self._added(x_SBI), strict=True))
        if not self.has_magnitude:
            return base_SBO + self._joined(base_SBO, parts_SBO)
        return self._with_magnitude(base_SBO, parts_SBO)

    def _added(self, x_SBI: Tensor) -> list[Tensor]:
        """What each adapter adds to its own part of the output."""
        if self.training and self._dropout:
            x_SBI = _dropout(x_SBI, self._dropout, self._split)
        whole_A = torch.cat([self._get(name, A) for name in self.names])
        low_SBR = functional.linear(x_SBI, whole_A)
        if self._split.by_rows and self._split.sequence:
            low_SBR = gather_from_sequence_parallel_region(low_SBR)
        elif self._split.by_rows:
            low_SBR = copy_to_tensor_model_parallel_region(low_SBR)
        elif self._split.sequence:
            low_SBR = reduce_scatter_to_sequence_parallel_region(low_SBR)
        else:
            low_SBR = reduce_from_tensor_model_parallel_region(low_SBR)
        lows = (low_SBR * self._scale).chunk(len(self.names), dim=-1)
        return [
            functional.linear(low, self._get(name, B))
            for name, low in zip(self.names, lows, strict=True)
        ]

    def _joined(self, base_SBO: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts of the output in the order of the joined matrix; zeros where there is no adapter.

        Args:
            base_SBO: The whole output, or a tensor like it, whose last dim is the output's.
            parts: By name.
        """
        found = [
            parts[name] if name in parts else base_SBO.new_zeros((*base_SBO.shape[:-1], rows))
            for name, rows in self._outputs.items()
        ]
        if len(found) == 1:
            return found[0]
        blocks = [part.unflatten(-1, (self._groups, -1)) for part in found]
        return torch.cat(blocks, dim=-1).flatten(-2)

    def _with_magnitude(self, base_SBO: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """DoRA's output: each row of the weight has the length that was learned for it."""
        norms = self._own_norms(self._effective_weight())
        scales = {name: self._get(name, MAGNITUDE) / norms[name] for name in self.names}
        ones = base_SBO.new_ones(base_SBO.shape[-1])
        scale_O = self._joined(ones, {name: scale - 1 for name, scale in scales.items()}) + 1
        return (base_SBO + self._joined(base_SBO, parts)) * scale_O

    @torch.no_grad()
    def _effective_weight(self) -> dict[str, Tensor]:
        """This rank's part of W' by Hugging Face layer; the paper, section 4.3, needs no gradient
        through its length."""
        weight = whole_weight(self._linear[0])
        parts = self._own_rows(weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        pairs = {n: (self._get(n, B).to(dtype), self._get(n, A).to(dtype)) for n in self.names}
        return {n: parts[n].to(dtype) + self._scale * b @ a for n, (b, a) in pairs.items()}

    def _own_rows(self, weight: Tensor) -> dict[str, Tensor]:
        """The rows of the joined matrix by Hugging Face layer: the inverse of ``_joined``."""
        sizes = [rows // self._groups for rows in self._outputs.values()]
        blocks = weight.unflatten(0, (self._groups, -1)).split(sizes, dim=1)
        return {name: b.flatten(0, 1) for name, b in zip(self._outputs, blocks, strict=True)}

    def _own_norms(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The length of each row of whole matrices, of which this rank has a part."""
        squares = {name: weight.square().sum(1) for name, weight in weights.items()}
        if not self._split.by_rows and self._split.size > 1:
            for square in squares.values():
                torch.distributed.all_reduce(
                    square, group=parallel_state.get_tensor_model_parallel_group()
                )
        dtype = self._get(self.names[0], B).dtype
        return {name: square.sqrt().to(dtype) for name, square in squares.items()}

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Give each row the length that it has in the base weights. A collective of tensor-parallel
        ranks; without DoRA nothing."""
        if self.has_magnitude:
            for name, norm in self._own_norms(self._effective_weight()).items():
                self._get(name, MAGNITUDE).copy_(norm)

    def _get(self, name: str, part: str) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, f"{name}_{part}")
        return parameter

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The parameters with their places in the whole ones, as megatron-core asks for them."""
        own = self.state_dict(prefix="", keep_vars=True)
        axes = {
            name: parameter.partition_dim
            for name, parameter in own.items()
            if getattr(parameter, "tensor_model_parallel", False)
        }
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, axes, sharded_offsets
        )
        return sharded


def _dropout(x_SBI: Tensor, probability: float, split: _Split) -> Tensor:
    """Dropout whose mask is a part of the mask that one rank alone would draw."""
    shape = list(x_SBI.shape)
    dim = 0 if split.by_rows and split.sequence else 2 if not split.by_rows else None
    if dim is not None:
        shape[dim] *= split.size
    kept = torch.rand(shape, device=x_SBI.device) >= probability
    if dim is not None:
        kept = kept.chunk(split.size, dim)[split.rank]
    return x_SBI * kept / (1 - probability)


def add_adapters(config: Config, parts: Sequence[nn.Module]) -> None:
    """Put adapters beside the linear layers of this rank's parts. The base must be frozen.

    A and B are zeros until ``initialization.py`` or a checkpoint fills them.

    Args:
        config: A checked config with ``adapter.rank`` above 0.
        parts: From ``build_model``.
    """
    adapter, model = config.adapter, config.model
    group = parallel_state.get_tensor_model_parallel_group()
    dropout = adapter.dropout
    for part in parts:
        decoder: Any = part.decoder
        for layer in decoder.layers:
            layer.adapter_dropout = dropout
            for site in SITES:
                if not set(site.outputs(model)) & set(adapter.target_modules):
                    continue
                parent = layer.get_submodule(site.parent)
                linear = parent.get_submodule(site.linear)
                split = _Split(
                    site.by_rows, config.parallel.sequence_parallel, group.rank(), group.size()
                )
                groups = site.groups(model) // (group.size() if site.groups(model) > 1 else 1)
                module = LinearAdapter(adapter, linear, site.outputs(model), groups, split)
                parent.add_module(site.module, module)
                linear.register_forward_hook(_AddAdapter(module))


class _AddAdapter:
    """The hook of a linear layer that calls its adapter."""

    def __init__(self, adapter: LinearAdapter) -> None:
        self._adapter = adapter

    def __call__(self, linear: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        result, bias = output
        return self._adapter(inputs[0], result), bias


def linear_adapters(part: nn.Module) -> Iterator[LinearAdapter]:
    """The adapters in a part of the model."""
    for module in part.modules():
        if isinstance(module, LinearAdapter):
            yield module
