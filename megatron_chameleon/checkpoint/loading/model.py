"""Fill the model that training uses with the weights of a checkpoint of any format and layout.

Every process of the job calls this. Each tensor is read by one of the ranks that hold parts of it
or copies of them, which gives the others what is theirs. So each file is read once in the whole
job, and no rank holds more than its own part of the model and one whole tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.loading.base_weights import build_adapters
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ChameleonError, CheckpointError
from megatron_chameleon.model.chameleon import ChameleonModel, build_model
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.model.quantized.linear import quantize_rest, quantized_layers
from megatron_chameleon.model.tensor_shards import take_shard
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import all_gather, raise_together
from megatron_chameleon.parallel.topology import Topology


def load_model(
    reader: CheckpointReader, config: Config, topology: Topology, vocab_rows: int | None = None
) -> list[ChameleonModel]:
    """This rank's parts of the model with the checkpoint's weights, which need no gradients.

    Args:
        reader: The checkpoint.
        config: A checked config with the checkpoint's ``model`` section.
        topology: From ``create_topology``.
        vocab_rows: A multiple of the tensor-parallel size that is at least the vocabulary's size;
            the rows behind the vocabulary become zeros. None: the vocabulary's size.

    Raises:
        CheckpointError: As ``fill_weights``.
    """
    vocab_rows = vocab_rows or reader.dimensions.vocab_size
    parts = build_model(config, vocab_rows, topology, draws_weights=False)
    for part in parts:
        part.requires_grad_(False)
    fill_weights(reader, parts)
    return parts


def build_first_model(
    config: Config, vocab_size: int, topology: Topology, weights: CheckpointReader | None
) -> list[ChameleonModel]:
    """The model that a run begins with: ``build_model``, with the weights of a checkpoint if any.

    Args:
        config: A checked config, which fits the checkpoint.
        vocab_size: A multiple of the tensor-parallel size.
        topology: From ``create_topology``.
        weights: The checkpoint; None draws the weights from the config's seed.

    Raises:
        CheckpointError: As ``fill_weights``.
    """
    parts = build_model(config, vocab_size, topology, draws_weights=weights is None)
    if weights is not None:
        fill_weights(weights, parts)
    for part in parts:
        quantize_rest(part)
    if config.adapter.rank:
        build_adapters(config, parts, topology)
    return parts


def fill_weights(reader: CheckpointReader, parts: Sequence[nn.Module]) -> None:
    """Copy the weights of a checkpoint into the parameters of this rank. A collective.

    Parameters that the checkpoint's format does not know, such as those of adapters, stay as they
    are.

    Args:
        reader: The checkpoint.
        parts: This rank's parts of the model, before an optimizer copies their parameters.

    Raises:
        CheckpointError: On every rank, if any cannot read a tensor, or has opened another
            checkpoint than rank 0.
    """
    from megatron.core import parallel_state

    _check_same(reader)
    rows = {}
    for row in tensor_rows(reader.dimensions):
        layer = "" if row.layer is None else f"layers.{row.layer}."
        rows[row.megatron_name.replace("layers.", layer)] = row
    tensor = parallel_state.get_tensor_model_parallel_group()
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    at_once = tensor.size() * data.size()
    failure = None
    for part in parts:
        quantized = {layer.weight: layer for layer in quantized_layers(part)}
        named = [pair for pair in named_global_parameters(part) if pair[0] in rows]
        for start in range(0, len(named), at_once):
            group = [_Target.of(*pair) for pair in named[start : start + at_once]]
            found = _fill(reader, rows, group, tensor, data)
            failure = failure or found
            for target in group:
                if target.parameter in quantized:
                    quantized[target.parameter].quantize(target.tensor)
    raise_together(failure)


def _check_same(reader: CheckpointReader) -> None:
    """Refuse to mix checkpoints: in the folder of a run that goes on, the newest one changes.

    Raises:
        CheckpointError: On every rank.
    """
    opened = all_gather((reader.folder.name, reader.step))
    for rank, found in enumerate(opened):
        if found != opened[0]:
            what = f"rank 0 has opened {opened[0][0]} (step {opened[0][1]:,}), and rank {rank} "
            what += f"{found[0]} (step {found[1]:,})"
            remedy = "Give the folder of one checkpoint instead of a run's"
            raise CheckpointError(str(reader.folder), what, remedy)


@dataclass(frozen=True)
class _Target:
    """A parameter to fill, and the tensor of the device that its values go to.

    It is the parameter's own, except of matrices to quantize, which are kept in main memory.
    """

    name: str
    parameter: nn.Parameter
    tensor: Tensor

    @staticmethod
    def of(name: str, parameter: nn.Parameter) -> "_Target":
        device = platform.device()
        if parameter.device == device:
            return _Target(name, parameter, parameter.data)
        return _Target(name, parameter, torch.empty_like(parameter.data, device=device))


@torch.no_grad()
def _fill(
    reader: CheckpointReader,
    rows: dict[str, TensorRow],
    targets: Sequence[_Target],
    tensor: torch.distributed.ProcessGroup,
    data: torch.distributed.ProcessGroup,
) -> ChameleonError | None:
    """Fill up to as many parameters as there are ranks that share them: each reads one.

    Args:
        reader: The checkpoint.
        rows: Its rows by the names of parameters in the whole model.
        targets: The same parameters on every rank of both groups.
        tensor: The ranks that hold the parts of the parameters.
        data: The ranks that hold the same parts as this one.

    Returns:
        Why this rank could not read its tensor. The others then get zeros, instead of waiting.
    """
    size = tensor.size()
    shares = [targets[start : start + size] for start in range(0, len(targets), size)]
    mine = shares[data.rank()] if data.rank() < len(shares) else []
    own, failure = None, None
    if tensor.rank() < len(mine):
        target = mine[tensor.rank()]
        try:
            own = _shards(reader.read(rows[target.name]), target, size)
        except ChameleonError as error:
            own, failure = [torch.zeros_like(target.tensor)] * size, error
    for source, target in enumerate(mine):
        if size == 1:
            assert own is not None
            target.tensor.copy_(own[0])
            continue
        shards = own if tensor.rank() == source else None
        torch.distributed.scatter(target.tensor, shards, group=tensor, group_src=source)
    if data.size() > 1:
        for owner, share in enumerate(shares):
            for target in share:
                torch.distributed.broadcast(target.tensor, group=data, group_src=owner)
    return failure


def _shards(whole: Tensor, target: _Target, size: int) -> list[Tensor]:
    """The parts of a tensor of all tensor-parallel ranks, with the dtype and device of this rank's.

    Rows that the checkpoint's vocabulary lacks become zeros.
    """
    parameter, name = target.parameter, target.name
    dim = getattr(parameter, "partition_dim", -1)
    whole = whole.to(target.tensor.device, parameter.dtype)
    if size == 1 or dim < 0:
        missing = len(parameter) - len(whole)
        return [functional.pad(whole, (0, 0) * (whole.dim() - 1) + (0, missing))] * size
    missing = parameter.shape[0] * size - len(whole) if dim == 0 else 0
    whole = functional.pad(whole, (0, 0) * (whole.dim() - 1) + (0, missing))
    return [take_shard(whole, name, dim, rank, size).contiguous() for rank in range(size)]
