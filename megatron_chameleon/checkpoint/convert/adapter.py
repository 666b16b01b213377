"""Write the adapter of a run as a folder of ``peft``, whole or not at all.

chameleon convert runs/lora adapter --to hf              the adapter alone
chameleon convert runs/lora merged --to hf --merge       the weights with the adapter in them
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.adapters.adapter import Adapter
from megatron_chameleon.checkpoint.adapters.peft_folder import read_peft_folder, write_peft_folder
from megatron_chameleon.checkpoint.convert.partial_folder import partial_folder, sync
from megatron_chameleon.checkpoint.convert.plan import ConversionOptions, check_conversion_options
from megatron_chameleon.checkpoint.convert.streaming import Progress
from megatron_chameleon.checkpoint.formats.adapted import find_adapter
from megatron_chameleon.checkpoint.state.integrity import write_sums
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.outputs import check_output_folder


@dataclass(frozen=True)
class AdapterExport:
    """What was written."""

    adapter: Adapter
    parameters: int
    total_bytes: int


def find_source_adapter(source: Path, to: str, *, merge: bool, ema: bool) -> Adapter | None:
    """The adapter to be written by itself; None if whole weights are to be written.

    Args:
        source: A checkpoint of any format, or an adapter.
        to: The target format.
        merge: Whether the user wants the weights with the adapter in them.
        ema: Whether the moving average stands for the numbers.

    Raises:
        ConfigError: ``merge`` does not fit the source, or its lack does not fit ``to``.
        CheckpointError: An adapter cannot be read.
    """
    adapter = find_adapter(source, ema=ema) if source.is_dir() else None
    if merge and adapter is None:
        what = f"{source} has whole weights, and there is nothing to merge"
        raise ConfigError("--merge", what, "Leave it out")
    if adapter is not None and not merge and to != "hf":
        what = f"{source} is an adapter, which has its own form only as peft's folder (--to hf)"
        remedy = "Add --merge to write its weights with the adapter in them, or use --to hf"
        raise ConfigError(f"--to {to}", what, remedy)
    return None if merge else adapter


def export_adapter(
    adapter: Adapter, destination: Path, progress: Progress = lambda line: None
) -> AdapterExport:
    """Write an adapter as a folder of ``peft`` and read it back.

    Args:
        adapter: From ``find_source_adapter``.
        destination: A folder that does not exist.
        progress: Called with lines about interrupted conversions.

    Raises:
        CheckpointError: The destination exists or cannot be written.
    """
    check_conversion_options("hf", ConversionOptions(), destination)
    check_output_folder("the destination", destination, CheckpointError)
    with partial_folder(destination, progress) as partial:
        new = partial / "new"
        new.mkdir()
        files = write_peft_folder(adapter, new)
        parameters = _compare(adapter, read_peft_folder(new))
        write_sums(new, {})
        sync(new)
        new.replace(destination)
    return AdapterExport(adapter, parameters, sum(files.values()))


def _compare(old: Adapter, new: Adapter) -> int:
    """Check that what was written is what was to be written; return the number of parameters."""
    parameters = 0
    for name in old.pairs:
        found = new.parts(name)
        for part, tensor in old.parts(name).items():
            parameters += tensor.numel()
            if (
                not torch.equal(tensor, found[part])
                or old.pairs[name].scale != new.pairs[name].scale
            ):
                what = f"{name} differs after writing"
                raise CheckpointError(new.where, what, "Convert again, and check the disk")
    return parameters
