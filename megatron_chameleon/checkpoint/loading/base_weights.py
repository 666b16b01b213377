"""The frozen weights of a run with an adapter: which they are, and the adapter's own beginning."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_chameleon.checkpoint.adapters.adapter import Adapter
from megatron_chameleon.checkpoint.adapters.peft_folder import is_peft_folder, read_peft_folder
from megatron_chameleon.checkpoint.adapters.stored import (
    adapter_base,
    base_entry,
    check_base,
    missing_base,
)
from megatron_chameleon.checkpoint.formats.adapted import AdaptedReader
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.adapters import adapter_place, is_adapter
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.start import Start
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.files import why_no_folder
from megatron_chameleon.model.chameleon import ChameleonModel
from megatron_chameleon.model.initialization import initialize_adapters, named_global_parameters
from megatron_chameleon.model.tensor_shards import take_shard
from megatron_chameleon.model.tuning.adapters import add_adapters, linear_adapters
from megatron_chameleon.parallel.topology import Topology


@dataclass(frozen=True)
class FirstWeights:
    """Which weights a run's model is built with.

    Attributes:
        start: Where the run begins or goes on.
        reader: The opened weights: those that the run begins with, or the frozen ones beside an
            adapter; None: they are drawn, or come from the run's own checkpoint.
        entries: What ``state.json`` records of them.
    """

    start: Start
    reader: CheckpointReader | None = None
    entries: dict[str, Any] = field(default_factory=dict)


def find_first_weights(config: Config, start: Start) -> FirstWeights:
    """Open the weights that a run's model is built with, before its own checkpoint is loaded.

    Raises:
        CheckpointError: They are not there, or are not those that the adapter was trained on; or
            the checkpoint has an adapter and the config has none, or the other way round.
        ConfigError: There are no weights to adapt.
    """
    checkpoint = start.checkpoint
    state = load_state(checkpoint) if checkpoint else {}
    recorded = adapter_base(state, str(checkpoint))
    if not config.adapter.rank:
        if recorded:
            what = "It is of a run with an adapter, and adapter.rank is 0"
            remedy = f"Keep the run's config, or use --start-from {checkpoint} in another "
            remedy += "logging.run_dir to begin with the weights and the adapter in one"
            raise CheckpointError(str(checkpoint), what, remedy)
        return FirstWeights(start, open_checkpoint(start.weights) if start.weights else None)
    if recorded:
        place = Path(config.adapter.base) if config.adapter.base else recorded[0]
        if not place.is_dir():
            raise missing_base(place, str(checkpoint))
        reader = open_checkpoint(place)
        check_base(reader.folder, reader.weight_files, recorded[1], str(checkpoint))
    else:
        start = _beginning(config, start, state)
        assert start.weights is not None
        reader = open_checkpoint(start.weights)
        if isinstance(reader, AdaptedReader):
            raise _not_whole(reader)
        if config.adapter.start_from:
            _check_own(config, open_first_adapter(config), reader)
    return FirstWeights(start, reader, base_entry(reader.folder, reader.weight_files))


def _beginning(config: Config, start: Start, state: dict[str, Any]) -> Start:
    """The start of a run whose adapter begins."""
    if start.weights is not None:
        return start
    if start.checkpoint is None:
        what = f"{config.adapter.rank} needs weights to adapt, and the run begins with random ones"
        raise ConfigError("adapter.rank", what, "Give --start-from FOLDER, or set it to 0")
    if state.get("optimizer") is False:  # as a conversion writes it
        return replace(start, checkpoint=None, weights=start.checkpoint)
    what = f"It has whole weights, and a run with adapter.rank {config.adapter.rank} cannot go on "
    remedy = f"Use --start-from {start.checkpoint} in another logging.run_dir"
    raise CheckpointError(str(start.checkpoint), f"{what}from it", remedy)


def _not_whole(reader: AdaptedReader) -> CheckpointError:
    """The error of a run whose frozen weights would themselves be an adapter and its base."""
    what = "is an adapter, and the frozen weights beside an adapter must be whole"
    remedy = (
        f"To begin with both in one, run `chameleon convert {reader.folder} MERGED --to hf "
        "--merge` and give --start-from MERGED. To train this adapter on, give --start-from "
        f"{reader.base.folder} and a folder of peft in adapter.start_from (`chameleon convert "
        "--to hf` writes one)"
    )
    return CheckpointError(str(reader.folder), what, remedy)


def open_first_adapter(config: Config) -> Adapter:
    """The adapter that ``adapter.start_from`` names.

    Raises:
        CheckpointError: The folder has none that can be read.
    """
    folder = Path(config.adapter.start_from or "")
    if not is_peft_folder(folder):
        what = "has no adapter_config.json" if folder.is_dir() else why_no_folder(folder)
        remedy = "Give a folder of peft in adapter.start_from"
        raise CheckpointError(str(folder), what, remedy)
    return read_peft_folder(folder)


def _check_own(config: Config, adapter: Adapter, base: CheckpointReader) -> None:
    """Refuse an adapter of another kind than the config's.

    Raises:
        CheckpointError: It names every value that differs.
    """
    own, found = config.adapter, adapter.config
    rows = tensor_rows(base.dimensions)
    adapter.check((shape for row in rows for shape in row.hf_shapes.items()), str(base.folder))
    differing = [
        f"adapter.{key}={getattr(found, key)} (your config: {getattr(own, key)})"
        for key in ("rank", "alpha", "dora")
        if getattr(found, key) != getattr(own, key)
    ]
    names = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in adapter.pairs}
    if more := sorted(names - set(own.target_modules)):
        differing.append(f"an adapter of {', '.join(more)}, which adapter.target_modules lacks")
    odd = [
        name
        for name, pair in adapter.pairs.items()
        if pair.low().shape[0] != found.rank or pair.scale != found.alpha / found.rank
    ]
    if odd and not differing:
        differing.append(f"another rank or alpha in {odd[0]} than in other layers")
    if differing:
        what = f"It has {', '.join(differing)}"
        raise CheckpointError(adapter.where, what, "Set them in your config, or merge it first")


def build_adapters(config: Config, parts: Sequence[ChameleonModel], topology: Topology) -> None:
    """Put the first adapters beside the linear layers of a model that has its weights. A
    collective.

    Args:
        config: A checked config with ``adapter.rank`` above 0.
        parts: This rank's parts of the model.
        topology: From ``create_topology``.
    """
    add_adapters(config, parts)
    rank, size = topology.tensor_rank, topology.tensor_size
    for part in parts:
        initialize_adapters(part, seed=config.training.seed, rank=rank, size=size)
        for module in linear_adapters(part):
            module.reset_magnitude()
    if config.adapter.start_from:
        _fill(open_first_adapter(config), parts, rank, size)


@torch.no_grad()
def _fill(adapter: Adapter, parts: Sequence[nn.Module], rank: int, size: int) -> None:
    """Copy an adapter into the layers that it has one for; the others begin anew."""
    for part in parts:
        for name, parameter in named_global_parameters(part):
            if not is_adapter(name):
                continue
            target, kind = adapter_place(name)
            if f"{target}.weight" not in adapter.pairs:
                continue
            whole = adapter.parts(f"{target}.weight")[kind]
            dim = getattr(parameter, "partition_dim", -1)
            parameter.copy_(take_shard(whole, name, dim, rank, size) if dim >= 0 else whole)
