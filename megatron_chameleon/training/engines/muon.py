"""Muon for the matrices of the layers, beside megatron-core's AdamW for all other parameters.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) makes the update of a matrix from
its momentum, whose singular values it brings near 1. ``optimizer.py`` puts it into megatron-core's
optimizers, as ``get_megatron_muon_optimizer`` does. That function itself is not used: in 0.16.1 it
does not fit the released ``emerging_optimizers``, orthogonalizes each tensor-parallel rank's part
by itself unless told otherwise, takes the weights of the QK-norms for matrices, and orthogonalizes
gate and up as one.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_chameleon.checkpoint.names.mappings import (
    ATTENTION_OUTPUT,
    DOWN,
    FUSED_QKV,
    GATE_UP,
    Dimensions,
    TensorMapping,
)
from megatron_chameleon.checkpoint.names.optimizer_state import MOMENTUM
from megatron_chameleon.checkpoint.names.table import TABLE
from megatron_chameleon.config.schema import Config, OptimizerConfig
from megatron_chameleon.model.tensor_shards import join_shards, take_shard

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Of the Newton-Schulz steps, in turn. Source: "quintic" in NVIDIA's emerging_optimizers, which
megatron-core takes too; https://leloykun.github.io/ponder/muon-opt-coeffs derives them."""
SMALLEST_NORM = 1e-7
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: max(rows, columns) ** 0.5,  # arXiv 2502.16982
    "unit_rms_norm": lambda rows, columns: (rows / columns) ** 0.5,  # arXiv 2502.07529
    "shape_scaling": lambda rows, columns: max(1.0, rows / columns) ** 0.5,  # Jordan et al.
}
"""``muon_scale_mode``: the factor of an update of so many rows and columns."""
MATRICES = (FUSED_QKV, ATTENTION_OUTPUT, GATE_UP, DOWN)


@dataclass(frozen=True)
class Matrix:
    """What Muon needs to know of a parameter, which may be several matrices in one.

    Attributes:
        name: The parameter's.
        mapping: How the whole tensor is split into the matrices of the model, and joined again.
        dim: The dimension in which tensor parallelism splits it; None: it is whole.
    """

    name: str
    mapping: TensorMapping
    dim: int | None

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor from each tensor-parallel rank's part. A collective of these ranks."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.dim is None or group.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return join_shards(parts, self.name, self.dim)

    def own_part(self, whole: Tensor) -> Tensor:
        """The inverse of ``whole``."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.dim is None or group.size() == 1:
            return whole
        return take_shard(whole, self.name, self.dim, group.rank(), group.size())


def find_matrix(name: str, parameter: nn.Parameter) -> Matrix | None:
    """What Muon needs to know of a parameter; None if AdamW updates it.

    Args:
        name: Its name in a part of the model, with or without prefixes of wrappers.
        parameter: With megatron-core's attributes.
    """
    words = [word for word in name.split(".") if not word.isdecimal()]
    for row in TABLE:
        if row.mapping in MATRICES and ".".join(words).endswith(row.megatron):
            dim = getattr(parameter, "partition_dim", -1)
            return Matrix(name, row.mapping, dim if dim >= 0 else None)
    return None


class Muon(Optimizer):
    """Muon with decoupled weight decay.

    Of the gradient G of a weight W, with momentum buffer B, which is in fp32 like both:

        B <- m B + (1 - m) G
        U <- (1 - m) G + m B  with Nesterov momentum, else B
        W <- (1 - lr * weight_decay) W - lr * scale * orthogonal(U)

    Queries, keys and values are matrices of their own, and so are gate and up, although
    megatron-core stores them as one: so they are in the released models, and orthogonalizing them
    together would couple their updates. Every matrix is whole when it is orthogonalized, so the
    result does not depend on the layout.

    Args:
        groups: megatron-core's parameter groups.
        matrices: Of the parameters of all groups, in their order.
        values: The config's.
        dimensions: The model's sizes.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        matrices: Sequence[Matrix],
        values: OptimizerConfig,
        dimensions: Dimensions,
    ) -> None:
        super().__init__(groups, {"lr": values.lr, "weight_decay": values.weight_decay})
        self._matrices, self._values, self._dimensions = tuple(matrices), values, dimensions

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters. A collective of the tensor-parallel ranks."""
        momentum = self._values.muon_momentum
        # megatron-core may have put fp32 copies in the places of the parameters.
        parameters = ((group, p) for group in self.param_groups for p in group["params"])
        for (group, parameter), matrix in zip(parameters, self._matrices, strict=True):
            buffer = self.momentum_of(parameter)
            gradient = parameter.grad.to(buffer.dtype)
            buffer.lerp_(gradient, 1 - momentum)
            nesterov = self._values.muon_use_nesterov
            update = gradient.lerp(buffer, momentum) if nesterov else buffer
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(self._orthogonal(update, matrix), alpha=-group["lr"])

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """The momentum buffer of a parameter; zeros before its first update."""
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        buffer: Tensor = state[MOMENTUM]
        return buffer

    def _orthogonal(self, update: Tensor, matrix: Matrix) -> Tensor:
        """The update of this rank's part, from that of the whole parameter."""
        values = self._values
        whole = matrix.whole(update)
        parts = matrix.mapping.split(whole, self._dimensions)
        factor = values.muon_extra_scale_factor
        done = [
            orthogonalize(part, values.muon_num_ns_steps, values.muon_fp32_matmul_prec)
            * (factor * SCALES[values.muon_scale_mode](*part.shape))
            for part in parts
        ]
        return matrix.own_part(matrix.mapping.join(done, self._dimensions))


def orthogonalize(matrix: Tensor, steps: int, precision: str = "highest") -> Tensor:
    """The nearest matrix whose singular values are about 1, by Newton-Schulz steps.

    The directions of the singular vectors stay. A zero matrix stays zero.

    Args:
        matrix: [rows, columns].
        steps: How many; 5 bring singular values above 0.3% of the matrix's norm to 0.97 to 1.15.
        precision: ``muon_fp32_matmul_prec``.

    Returns:
        [rows, columns] in the dtype of ``matrix``.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # the products are then of the smaller size
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # no singular value is above 1
    x = x.bfloat16() if precision == "medium" else x
    with _matmul_precision("high" if precision == "high" else "highest"):
        for a, b, c in itertools.islice(itertools.cycle(COEFFICIENTS), steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrix.dtype)
    return x.T if is_tall else x


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dimensions_of(config: Config) -> Dimensions:
    """The sizes that say how fused matrices are split; vocabulary and QK-norms do not matter."""
    return Dimensions.of(config.model, vocab_size=0, q_norm_groups=0, k_norm_groups=0)
