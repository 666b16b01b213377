"""Gradient norms by groups of parameters: which part of the model makes the norm grow.

megatron-core tells the norm of all gradients only. Here one pass over the gradients gives both: a
second one would cost as much as all else that the monitor does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_chameleon.parallel import platform

# the first that a parameter's name contains
_GROUPS = (
    ("q_layernorm", "qk_norms"),
    ("k_layernorm", "qk_norms"),
    ("layernorm", "norms"),
    ("self_attention", "attention"),
    ("mlp", "feed_forward"),
    ("embedding", "embedding"),
    ("output_layer", "output"),
)
GROUPS = tuple(dict.fromkeys(group for _, group in _GROUPS))


class GradientGroups:
    """Norms of the gradients that megatron-core's optimizer is about to use.

    Args:
        parts: This rank's parts of the model.
        optimizer: megatron-core's, distributed or not.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizer: Any) -> None:
        self._optimizer = optimizer
        self._members = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parameters: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
        for part in parts:
            for name, parameter in part.named_parameters():
                if param_is_not_tensor_parallel_duplicate(parameter):
                    self._parameters[group_of(name)].append(parameter)

    def squares(self) -> Tensor:
        """Each group's sum of squares over the job, fp64, on the device: nothing waits for it here.

        Between the optimizer's ``prepare_grads`` and clipping, in place of ``get_grad_norm``. A
        collective.
        """
        squares = self._own_squares()
        group = self._optimizer.get_grad_stats_parallel_group()
        torch.distributed.all_reduce(squares, group=group)
        return squares

    @staticmethod
    def norms(squares: Tensor) -> tuple[float, dict[str, float]]:
        """The norm of all gradients, and ``grad_norm_GROUP`` of every group, from ``squares``."""
        found = squares.tolist()
        norms = {f"grad_norm_{name}": x**0.5 for name, x in zip(GROUPS, found, strict=True)}
        return sum(found) ** 0.5, norms

    def _own_squares(self) -> Tensor:
        """Each group's sum of this rank's squares, fp64."""
        found: list[Tensor] = []
        counts = []
        for parameters in self._parameters.values():
            gradients = [self._gradient(parameter) for parameter in parameters]
            known = [gradient for gradient in gradients if gradient is not None]
            found += known
            counts.append(len(known))
        if not found:
            return torch.zeros(len(GROUPS), dtype=torch.float64, device=platform.device())
        # bf16 gradients would get norms of 8 bits
        dtype = torch.float32 if found[0].dtype == torch.bfloat16 else None
        squares = torch.stack(torch._foreach_norm(found, dtype=dtype)).double().square()
        return torch.stack([part.sum() for part in squares.split(counts)])

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """What the optimizer is to use for a parameter; None if another rank has it."""
        for member in self._members:
            places = getattr(member, "model_param_group_index_map", None)
            if places is None:  # not distributed: fp32 copies of bf16 weights, or the weights
                return getattr(parameter, "main_param", parameter).grad
            if parameter in places:
                group, place = places[parameter]
                owned = member.param_groups[group]["params"][place]
                # megatron-core's precision-aware optimizer keeps gradients of another dtype apart
                decoupled = getattr(owned, "decoupled_grad", None)
                return owned.grad if decoupled is None else decoupled
        return None


def group_of(name: str) -> str:
    """The group of a parameter by its name."""
    return next(group for part, group in _GROUPS if part in name)
