"""Initial weights that are the same under every layout.

Each tensor is drawn whole, from a generator whose seed depends on the run's seed and the tensor's
name in the whole model, and each rank keeps its part. So tensor, pipeline and data parallelism do
not change the weights. The scales are GPT-2's, as in megatron-core: N(0, std), and N(0, std /
sqrt(2 layers)) for the two matrices that write to the residual stream.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_chameleon.checkpoint.names.adapters import A, is_adapter
from megatron_chameleon.model.tensor_shards import take_shard


def initialize_weights(
    model: nn.Module, *, seed: int, std: float, num_layers: int, rank: int, size: int
) -> None:
    """Draw the matrices of one part of the model. Norms keep their ones and zeros.

    Args:
        model: This rank's part, a ``GPTModel``.
        seed: The run's seed.
        std: Standard deviation of the matrices.
        num_layers: Number of layers in the whole model.
        rank: Tensor-parallel rank.
        size: Tensor-parallel size.
    """
    with torch.no_grad():
        for name, parameter in named_global_parameters(model):
            if "norm" in name:
                continue
            writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            scale = std / math.sqrt(2 * num_layers) if writes_residual else std
            generator = torch.Generator().manual_seed(_key(seed, name))
            parameter.copy_(_draw_part(parameter, name, scale, generator, rank, size))


@torch.no_grad()
def initialize_adapters(model: nn.Module, *, seed: int, rank: int, size: int) -> None:
    """Draw the matrices A of the adapters of one part of the model, as ``peft`` does; B stays zero.

    A [rank, in] is uniform between -1 / sqrt(in) and 1 / sqrt(in).

    Args and layout: as for ``initialize_weights``.
    """
    for name, parameter in named_global_parameters(model):
        if not (is_adapter(name) and name.endswith(A)):
            continue
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        if size > 1 and dim >= 0:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(_key(seed, name))
        bound = 1 / math.sqrt(shape[1])
        whole = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(take_shard(whole, name, dim, rank, size) if dim >= 0 else whole)


def named_global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a ``GPTModel`` with their names in the whole model."""
    first_layer = _first_layer(model)
    for local_name, parameter in model.named_parameters():
        yield global_name(local_name, first_layer), parameter


def global_name(local_name: str, first_layer: int) -> str:
    """The name of a parameter, with its layer numbered from the start of the whole model."""
    return re.sub(
        r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m.group()) + first_layer), local_name
    )


def _first_layer(model: nn.Module) -> int:
    layers: Any = model.get_submodule("decoder.layers")
    return layers[0].layer_number - 1 if len(layers) else 0


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _draw_part(
    parameter: Tensor, name: str, std: float, generator: torch.Generator, rank: int, size: int
) -> Tensor:
    """Draw the whole tensor in fp32 and cut this rank's part out of it."""
    shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
    if size > 1 and dim >= 0:
        shape[dim] *= size
    whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    if size == 1 or dim < 0:
        return whole
    return take_shard(whole, name, dim, rank, size)
