"""Linear layers that compute what Transformer Engine's FP8 layers compute, on any device.

Inputs, weights and output gradients are cast to FP8 and multiplied with fp32 sums. Everything else
(collectives, parameter names, checkpoints) is megatron-core's. The layers are slower than without
FP8; their purpose is to show a recipe's effect on the loss.

Source of what is quantised when, and of where amaxes are shared: Transformer Engine 2.11,
transformer_engine/pytorch/module/linear.py and quantization.py, with megatron-core 0.16's
extensions/transformer_engine.py around it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_chameleon.config.schema import Fp8Config
from megatron_chameleon.model.fp8 import (
    E4M3,
    DelayedScaling,
    amax,
    current_scale,
    dequantised_product,
    gradient_dtype,
    quantise,
)


class _Fp8Product(torch.autograd.Function):
    """``x @ weight.T`` and both of its gradients, computed from FP8 values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        layer: "EmulatedFp8Linear",
        x_scale: Tensor,
        weight_fp8: Tensor,
        weight_scale: Tensor,
    ) -> Tensor:
        x_fp8 = quantise(x, x_scale, E4M3)
        ctx.save_for_backward(x_fp8, x_scale, weight_fp8, weight_scale)
        ctx.layer, ctx.dtypes = layer, (x.dtype, weight.dtype)
        return dequantised_product(x_fp8, weight_fp8.t(), x_scale, weight_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_fp8, x_scale, weight_fp8, weight_scale = ctx.saved_tensors
        scale = ctx.layer.gradient_scale(grad)
        grad_fp8 = quantise(grad, scale, gradient_dtype(ctx.layer.fp8))
        rows = grad_fp8.flatten(0, -2)
        grad_x = dequantised_product(grad_fp8, weight_fp8, scale, weight_scale)
        grad_weight = dequantised_product(rows.t(), x_fp8.flatten(0, -2), scale, x_scale)
        ctx.layer.finish_backward()
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None, None, None


class EmulatedFp8Linear(nn.Module):
    """What the column-parallel and the row-parallel layer below have in common.

    Args:
        fp8: The FP8 recipe.

    Attributes:
        is_first_microbatch: Whether the next forward pass quantises the weight again. All
            micro-batches of a step use the same quantised weight.
        is_off: Whether the layer computes as it would without FP8.
    """

    def __init__(self, *args: Any, fp8: Fp8Config, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8 = fp8
        self.is_off = False
        self.is_first_microbatch = True
        self._weight: tuple[Tensor, Tensor] | None = None
        self._slot = 0
        self._forward: DelayedScaling | None = None
        self._gradients: DelayedScaling | None = None
        self._is_first_layer = False
        self._scales_to_repeat: deque[Tensor] = deque()

    def share_scaling(
        self, slot: int, forward: DelayedScaling, gradients: DelayedScaling, is_first: bool
    ) -> None:
        """Use entries of a shared state of delayed scaling: two forward, one for the gradient.

        Args:
            slot: Number of this layer among those that share the state.
            forward: The scaling of inputs and weights.
            gradients: The scaling of output gradients.
            is_first: Whether this is the first layer, whose backward pass is the last.
        """
        self._slot, self._forward, self._gradients = slot, forward, gradients
        self._is_first_layer = is_first

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **other: Any,
    ) -> Tensor:
        """The product of ``ColumnParallelLinear.forward`` and ``RowParallelLinear.forward``.

        The sequence is gathered before it is quantised. Transformer Engine quantises first, with
        one scale for all ranks, which gives the same values.
        """
        assert bias is None
        if self.is_off:
            return super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **other,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        weight_fp8, weight_scale = self.quantised_weight(weight)
        scale = self.input_scale(input)
        return _Fp8Product.apply(input, weight, self, scale, weight_fp8, weight_scale)

    def input_scale(self, x: Tensor) -> Tensor:
        """The scale for an input. Recomputation repeats the scale of the first pass."""
        if self._forward is None:
            return current_scale(amax(x), E4M3)
        if is_checkpointing() and torch.is_grad_enabled():
            return self._scales_to_repeat.popleft()
        scale = self._forward.scale[2 * self._slot]
        if self.training:
            self._forward.record(2 * self._slot, x)
            if is_checkpointing():
                self._scales_to_repeat.append(scale)
        return scale

    def quantised_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight in FP8 and its scale, computed once per step while training."""
        if self.training and self._weight is not None and not self.is_first_microbatch:
            return self._weight
        if self._forward is None:
            scale = current_scale(amax(weight), E4M3)
        else:
            scale = self._forward.scale[2 * self._slot + 1]
            if self.training:
                self._forward.record(2 * self._slot + 1, weight)
        quantised = quantise(weight.detach(), scale, E4M3), scale
        if self.training:
            self._weight, self.is_first_microbatch = quantised, False
        return quantised

    def gradient_scale(self, grad: Tensor) -> Tensor:
        """The scale for an output gradient."""
        if self._gradients is None:
            return current_scale(amax(grad), gradient_dtype(self.fp8))
        self._gradients.record(self._slot, grad)
        return self._gradients.scale[self._slot]

    def finish_backward(self) -> None:
        """Update the gradients' scales once the backward pass of a micro-batch is complete."""
        if self._is_first_layer and self._gradients is not None:
            self._gradients.update()

    def get_extra_state(self) -> dict[str, Any] | None:
        """This layer's state of delayed scaling, equal on all tensor- and data-parallel ranks."""
        if self._forward is None or self._gradients is None:
            return None
        parts = self._own_parts()
        return {
            "format": self.fp8.format,
            "scale": torch.cat([scaling.scale[own] for scaling, own in parts]).cpu(),
            "amax_history": torch.cat([s.history[:, own] for s, own in parts], dim=1).cpu(),
        }

    def set_extra_state(self, state: Any) -> None:
        """Load a checkpoint's state. If it has none of this format, the scales start from 1.

        A history of another length is cut or padded with zeros, as in Transformer Engine
        (``adjust_amax_history_length`` in transformer_engine/pytorch/module/base.py).
        """
        if self._forward is None or not isinstance(state, dict):
            return
        if state["format"] != self.fp8.format:
            return
        history = state["amax_history"][: self.fp8.amax_history_len]
        missing = self.fp8.amax_history_len - len(history)
        history = nn.functional.pad(history, (0, 0, 0, missing))
        column = 0
        for scaling, own in self._own_parts():
            end = column + own.stop - own.start
            scaling.scale[own] = state["scale"][column:end].to(scaling.scale.device)
            scaling.history[:, own] = history[:, column:end].to(scaling.scale.device)
            column = end

    def _own_parts(self) -> list[tuple[DelayedScaling, slice]]:
        assert self._forward is not None and self._gradients is not None
        return [
            (self._forward, slice(2 * self._slot, 2 * self._slot + 2)),
            (self._gradients, slice(self._slot, self._slot + 1)),
        ]


class EmulatedColumnParallelLinear(EmulatedFp8Linear, ColumnParallelLinear):
    """megatron-core's layer, with its matrix product in FP8."""


class EmulatedRowParallelLinear(EmulatedFp8Linear, RowParallelLinear):
    """megatron-core's layer, with its matrix product in FP8."""


def set_up_delayed_scaling(decoder: nn.Module) -> None:
    """Set up delayed scaling for the emulated layers of a ``TransformerBlock`` that use it.

    The forward scales are updated when the block's forward pass ends, which is where Transformer
    Engine's autocast context ends. So with several micro-batches per step, the history gets an
    entry from each of them, and one per step from the weights.
    """
    layers: Any = decoder.layers
    linears = [
        linear
        for layer in layers
        for linear in (
            layer.self_attention.linear_qkv,
            layer.self_attention.linear_proj,
            layer.mlp.linear_fc1,
            layer.mlp.linear_fc2,
        )
        if isinstance(linear, EmulatedFp8Linear) and linear.fp8.recipe == "delayed"
    ]
    if not linears:
        return
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    forward = share_delayed_scaling(linears, group)

    def end_forward(block: nn.Module, inputs: Any, output: Any) -> None:
        if block.training and torch.is_grad_enabled():
            forward.update()

    decoder.register_forward_hook(end_forward)


def share_delayed_scaling(
    linears: Sequence[EmulatedFp8Linear], group: ProcessGroup | None = None
) -> DelayedScaling:
    """Let layers share one state of delayed scaling, so that one reduction serves them all.

    Args:
        linears: The layers in the order of the forward pass; at least one.
        group: Ranks that share their largest magnitudes.

    Returns:
        The scaling of inputs and weights. Update it after each forward pass.
    """
    fp8, device = linears[0].fp8, next(linears[0].parameters()).device
    forward = DelayedScaling(fp8, E4M3, 2 * len(linears), device, group)
    gradients = DelayedScaling(fp8, gradient_dtype(fp8), len(linears), device, group)
    for slot, linear in enumerate(linears):
        linear.share_scaling(slot, forward, gradients, is_first=slot == 0)
    return forward


def start_fp8_step(model: nn.Module) -> None:
    """Let the next forward pass quantise the weights again, because an update has changed them.

    Call it before the first micro-batch of each optimizer step. megatron-core's own function for
    this (``set_is_first_microbatch``) looks at ``config.fp8``, which is not set here.

    Args:
        model: One part of the model.
    """
    for module in model.modules():
        if isinstance(module, EmulatedFp8Linear):
            module.is_first_microbatch = True


@contextmanager
def without_fp8(model: nn.Module) -> Iterator[None]:
    """Let emulated layers compute without FP8 for a while; their scales stay as they are.

    Transformer Engine's layers use FP8 only where megatron-core's transformer block has entered
    their context.

    Args:
        model: One part of the model.
    """
    layers = [module for module in model.modules() if isinstance(module, EmulatedFp8Linear)]
    for layer in layers:
        layer.is_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_off = False
