"""The numbers of FP8 training: the two formats, and how Transformer Engine chooses its scales.

A tensor ``x`` becomes ``q = cast(x * scale)`` and stands for ``q / scale``. Delayed scaling takes
the scale from the largest magnitudes (amax) of earlier micro-batches, current scaling
("tensorwise") from the tensor itself. ``fp8_linear.py`` has the layers that use this.

Source: Transformer Engine 2.11: transformer_engine/common/recipe/delayed_scaling.cu and
recipe_common.cuh, transformer_engine/pytorch/quantization.py.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_chameleon.config.schema import Fp8Config

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FP32_LARGEST = torch.finfo(torch.float32).max


def gradient_dtype(fp8: Fp8Config) -> torch.dtype:
    """The format of output gradients; inputs and weights are E4M3 under either ``fp8.format``."""
    return E5M2 if fp8.format == "hybrid" else E4M3


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x * scale``; what is beyond the format becomes its largest value, NaN stays NaN.

    torch's own casts saturate or overflow depending on the version, hence the clamp.
    """
    largest = LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(dtype)


def dequantised_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """``a @ b`` of two FP8 matrices, summed in fp32, with their scales taken out: fp32."""
    return (a.float() @ b.float()) * (a_scale.reciprocal() * b_scale.reciprocal())


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, fp32 scalar. NaNs are passed over, as the kernels' ``fmaxf`` does."""
    largest = x.detach().abs().amax().float()
    if largest.isnan():
        largest = x.detach().float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()
    return largest


def current_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps ``largest`` to the format's end; 1 where it is 0 or infinite.

    Source: ``compute_scale_from_amax`` in recipe_common.cuh, with Transformer Engine's defaults (no
    powers of two, no epsilon).
    """
    usable = largest.isfinite() & (largest > 0)
    scale = _divide(LARGEST[dtype], largest)
    return torch.where(usable, scale, torch.ones_like(scale))


def _divide(numerator: float, largest: Tensor) -> Tensor:
    """Rounded once, as the kernels do; ``number / tensor`` would round a reciprocal first."""
    return (torch.full_like(largest, numerator) / largest).clamp(max=FP32_LARGEST)


class DelayedScaling:
    """Scales and amax histories of some tensors that are updated together.

    Args:
        fp8: Margin, length of the history and how an amax is taken from it.
        dtype: The FP8 format.
        count: Number N of tensors.
        device: Where the state lies.
        group: Ranks that share their largest magnitudes; None for this process alone.

    Attributes:
        scale: [N], for the tensors of the next micro-batch.
        history: [``amax_history_len``, N]; row 0 collects the running micro-batch, the last row is
            that of the newest finished one.
    """

    def __init__(
        self,
        fp8: Fp8Config,
        dtype: torch.dtype,
        count: int,
        device: torch.device | str = "cpu",
        group: ProcessGroup | None = None,
    ) -> None:
        self.scale = torch.ones(count, device=device)
        self.history = torch.zeros(fp8.amax_history_len, count, device=device)
        self._algo = fp8.amax_compute_algo
        self._scaled_largest = LARGEST[dtype] * 2.0**-fp8.margin
        self._group = group

    def record(self, slot: int, x: Tensor) -> None:
        """Take note of a tensor's largest magnitude."""
        self.history[0, slot] = torch.maximum(self.history[0, slot], amax(x))

    def update(self) -> None:
        """End a micro-batch: share the amaxes, set the next scales, move the histories on.

        A tensor that no rank saw (amax 0) keeps scale and history: that is how a weight, which is
        quantised in the first micro-batch of a step only, gets one entry a step. A scale stays also
        where its amax is infinite. Source: ``kernel_bulk`` in delayed_scaling.cu.
        """
        last = self.history[0].clone()
        if self._group is not None and self._group.size() > 1:
            torch.distributed.all_reduce(last, torch.distributed.ReduceOp.MAX, group=self._group)
        seen = last != 0
        moved = torch.cat([self.history[1:], last[None]])
        largest = last
        if self._algo == "max":
            largest = moved.nan_to_num(nan=0.0, posinf=torch.inf).amax(0)  # fmaxf
        usable = seen & largest.isfinite() & (largest > 0)
        scale = _divide(self._scaled_largest, largest)
        # a new tensor: products under way keep the scale they were made with
        self.scale = torch.where(usable, scale, self.scale)
        moved[0] = 0
        self.history = torch.where(seen, moved, self.history)
