"""Gradient norms by groups of parameters, to see which part of the model makes the norm grow.

megatron-core reports only the norm of all gradients. Here one pass over the gradients gives both; a
second pass would cost as much as everything else that is measured.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_chameleon.parallel import platform

# A parameter belongs to the first entry that its name contains.
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
    """The norms of the gradients that megatron-core's optimizer is about to use.

    Args:
        parts: This rank's parts of the model.
        optimizer: One of megatron-core's, distributed or not.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizer: Any) -> None:
        self._optimizer = optimizer
        self._members = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parameters: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
        for part in parts:
            for name, parameter in part.named_parameters():
                if parameter.requires_grad and param_is_not_tensor_parallel_duplicate(parameter):
                    self._parameters[group_of(name)].append(parameter)

    def squares(self) -> Tensor:
        """Each group's sum of squares over the whole run.

        It is called between the optimizer's ``prepare_grads`` and clipping, in place of
        ``get_grad_norm``. A collective.

        Returns:
            [groups] fp64 on the device. The host does not wait for it here.
        """
        squares = self._own_squares()
        group = self._optimizer.get_grad_stats_parallel_group()
        torch.distributed.all_reduce(squares, group=group)
        return squares

    @staticmethod
    def norms(squares: Tensor) -> tuple[float, dict[str, float]]:
        """The norm of all gradients, and ``grad_norm_GROUP`` for each group.

        Args:
            squares: From ``squares``.
        """
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
        # In bf16 the norms would have 8 bits of precision.
        dtype = torch.float32 if found[0].dtype == torch.bfloat16 else None
        squares = torch.stack(torch._foreach_norm(found, dtype=dtype)).double().square()
        return torch.stack([part.sum() for part in squares.split(counts)])

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient that the optimizer will use for a parameter; None if another rank has it."""
        for member in self._members:
            places = getattr(member, "model_param_group_index_map", None)
            if places is None:  # not distributed: an fp32 copy of a bf16 weight, or the weight
                return getattr(parameter, "main_param", parameter).grad
            if parameter in places:
                group, place = places[parameter]
                owned = member.param_groups[group]["params"][place]
                # megatron-core's precision-aware optimizer keeps gradients of another dtype here.
                decoupled = getattr(owned, "decoupled_grad", None)
                return owned.grad if decoupled is None else decoupled
        return None


def group_of(name: str) -> str:
    """The group that a parameter belongs to by its name."""
    return next(group for part, group in _GROUPS if part in name)
