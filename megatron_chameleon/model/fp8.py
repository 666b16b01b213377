"""The arithmetic of FP8 training: the two formats, and Transformer Engine's choice of scales.

A tensor ``x`` becomes ``q = cast(x * scale)``, which represents ``q / scale``. Delayed scaling
computes the scale from the largest magnitudes (amax) of earlier micro-batches, and current scaling
("tensorwise") from the tensor itself. The layers that use this are in ``fp8_linear.py``.

Source: Transformer Engine 2.11: transformer_engine/common/recipe/delayed_scaling.cu and
recipe_common.cuh, transformer_engine/pytorch/quantization.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
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
    """Cast ``x * scale``. Values beyond the format become its largest value, and NaN stays NaN.

    The clamp is needed because torch's casts saturate or overflow depending on the version.
    """
    largest = LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(dtype)


def dequantised_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """``a @ b`` of two FP8 matrices without their scales, summed and returned in fp32."""
    return (a.float() @ b.float()) * (a_scale.reciprocal() * b_scale.reciprocal())


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, an fp32 scalar. It ignores NaNs, as the kernels' ``fmaxf`` does."""
    largest = x.detach().abs().amax().float()
    if largest.isnan():
        largest = x.detach().float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()
    return largest


def current_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps ``largest`` to the format's largest value; 1 if it is 0 or infinite.

    Source: ``compute_scale_from_amax`` in recipe_common.cuh, with Transformer Engine's
    defaults (no powers of two, no epsilon).
    """
    usable = largest.isfinite() & (largest > 0)
    scale = _divide(LARGEST[dtype], largest)
    return torch.where(usable, scale, torch.ones_like(scale))


def _divide(numerator: float, largest: Tensor) -> Tensor:
    """Divide with one rounding, as the kernels do; ``number / tensor`` would round twice."""
    return (torch.full_like(largest, numerator) / largest).clamp(max=FP32_LARGEST)


class DelayedScaling:
    """Scales and amax histories of tensors that are updated together.

    Args:
        fp8: The recipe: margin, length of the history, and how an amax is computed from it.
        dtype: The FP8 format.
        count: Number N of tensors.
        device: The device of the state.
        group: Ranks that share their largest magnitudes; None for this process alone.

    Attributes:
        scale: [N], for the tensors of the next micro-batch.
        history: [``amax_history_len``, N]. Row 0 collects the running micro-batch, and the last row
            belongs to the newest finished one.
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
        """Record a tensor's largest magnitude."""
        self.history[0, slot] = torch.maximum(self.history[0, slot], amax(x))

    def update(self) -> None:
        """End a micro-batch: share the amaxes, set the next scales, advance the histories.

        A tensor that no rank saw (amax 0) keeps its scale and history. A weight is quantised only
        in the first micro-batch of a step, and so gets one entry per step. A scale also stays the
        same if its amax is infinite. Source: ``kernel_bulk`` in delayed_scaling.cu.
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
        # a new tensor, because unfinished products still hold the scale they were computed with
        self.scale = torch.where(usable, scale, self.scale)
        moved[0] = 0
        self.history = torch.where(seen, moved, self.history)


@contextmanager
def kept_fp8_scales(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Put Transformer Engine's scales and amax histories back to what they were.

    Its layers record the largest magnitudes of every forward pass, even without gradients, and the
    next training step would compute its scales from them. Emulated layers record nothing unless
    they are trained.

    Args:
        parts: This rank's parts of the model.
    """
    metas = [getattr(module, "fp8_meta", {}) for part in parts for module in part.modules()]
    states = [meta[key] for meta in metas for key in ("scaling_fwd", "scaling_bwd") if key in meta]
    tensors = [
        tensor
        for state in states
        for name in ("scale", "amax_history")
        if isinstance(tensor := getattr(state, name, None), Tensor)
    ]
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.copy_(values)  # in place: Transformer Engine's reduction holds the tensors
