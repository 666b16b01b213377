"""megatron-core's linear layers with a frozen matrix in 4 bits (nf4), by bitsandbytes.

QLoRA (Dettmers et al., arXiv 2305.14314), section 3: the weights are the 16 values of nf4 with a
scale for each 64 of them, and the scales are 8-bit numbers themselves (double quantization). A
product makes the whole matrix for a moment, in the format of the input, forward and backward. The
matrices cannot be split over tensor-parallel ranks: the scales of their parts would be others.

Until it has its weights, such a layer keeps an unfilled matrix in main memory, which no page backs.
Each one goes to the device as it is read, and is quantized there at once. So the device never holds
more than one whole matrix, however large the model is.
"""

import copy
import importlib
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from megatron_chameleon.parallel import platform


def is_installed() -> bool:
    """Whether bitsandbytes is."""
    return find_spec("bitsandbytes") is not None


class QuantizedLinear(nn.Module):
    """What both layers below share; mixed in before megatron-core's class.

    Attributes:
        weight: Before ``quantize``, a matrix [O, I] in main memory that is not set; then the packed
            numbers, two in a byte.
    """

    weight: nn.Parameter
    _partition_dim: int

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        on_host = copy.copy(config)
        on_host.use_cpu_initialization, on_host.perform_initialization = True, False
        super().__init__(*args, config=on_host, **kwargs)
        self.config: Any = config
        self._state: Any = None
        stride = kwargs.get("stride", 1)
        set_tensor_model_parallel_attributes(self.weight, True, self._partition_dim, stride)

    @property
    def is_quantized(self) -> bool:
        return self._state is not None

    def quantize(self, weight: Tensor) -> None:
        """Take a matrix [O, I] of the device in place of the one that was not set."""
        packed, self._state = _bitsandbytes("functional").quantize_4bit(
            weight.detach().contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def whole_weight(self) -> Tensor:
        """The matrix [O, I] that the packed numbers stand for."""
        whole: Tensor = _bitsandbytes("functional").dequantize_4bit(self.weight, self._state)
        return whole

    def packed_bytes(self) -> int:
        """Bytes of the packed numbers and their scales."""
        state = self._state
        tensors = (self.weight, state.absmax, state.code, state.offset, state.state2.absmax)
        return sum(tensor.nbytes for tensor in (*tensors, state.state2.code))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        # A matrix that is not set stays in main memory, when the model moves to the device.
        return super()._apply(fn, recurse) if self.is_quantized else self

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The product, in place of ``linear_with_frozen_weight``; there are no ranks to ask."""
        product: Tensor = _bitsandbytes().matmul_4bit(input, weight.t(), quant_state=self._state)
        return product


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """For queries, keys and values, and for the feed-forward's gate and value."""

    _partition_dim = 0


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """For the projections to the residual stream."""

    _partition_dim = 1


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    """The layers of a model whose matrix is, or will be, in 4 bits."""
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def quantize_rest(model: nn.Module) -> None:
    """Quantize the matrices that were set in main memory, as where they were drawn."""
    for layer in quantized_layers(model):
        if not layer.is_quantized:
            layer.quantize(layer.weight.to(platform.device()))


def whole_weight(linear: Any) -> Tensor:
    """The matrix [O, I] of a linear layer, quantized or not."""
    if isinstance(linear, QuantizedLinear):
        return linear.whole_weight()
    weight: Tensor = linear.weight
    return weight


def _bitsandbytes(module: str = "") -> Any:
    """bitsandbytes, or a module of it, which takes seconds to import."""
    # On CPUs it warns that a package with faster products is not there, which no extra of it has.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(f"bitsandbytes.{module}" if module else "bitsandbytes")
