"""Gradient norms by groups of parameters: which part of the model makes the norm grow.

megatron-core tells the norm of all gradients only. After its optimizer has stepped, the gradients
that it used are still there, on each rank those of its share.
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
    """Norms of the gradients that megatron-core's optimizer last used.

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

    def norms(self, total_norm: float) -> dict[str, float]:
        """``grad_norm_GROUP`` of every group, before clipping. A collective.

        Args:
            total_norm: Of all gradients, as the optimizer found it before it clipped them.
        """
        squares = torch.stack([self._square(group) for group in GROUPS])
        group = self._optimizer.get_grad_stats_parallel_group()
        torch.distributed.all_reduce(squares, group=group)
        limit = self._optimizer.config.clip_grad  # 0 for none
        scale = min(1.0, limit / (total_norm + 1e-6)) if limit else 1.0
        norms = squares.sqrt().div_(scale).tolist()
        return {f"grad_norm_{name}": norm for name, norm in zip(GROUPS, norms, strict=True)}

    def _square(self, group: str) -> Tensor:
        """Sum of this rank's squares, fp64."""
        gradients = [self._gradient(parameter) for parameter in self._parameters[group]]
        found = [gradient for gradient in gradients if gradient is not None]
        if not found:
            return torch.zeros((), dtype=torch.float64, device=platform.device())
        return torch.stack(torch._foreach_norm(found)).double().square().sum()

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """What the optimizer used for a parameter; None if another rank has it."""
        for member in self._members:
            places = getattr(member, "model_param_group_index_map", None)
            if places is None:  # not distributed: fp32 copies of bf16 weights, or the weights
                return getattr(parameter, "main_param", parameter).grad
            if parameter in places:
                group, place = places[parameter]
                return member.param_groups[group]["params"][place].grad
        return None


def group_of(name: str) -> str:
    """The group of a parameter by its name."""
    return next(group for part, group in _GROUPS if part in name)
