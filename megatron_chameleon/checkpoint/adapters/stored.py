"""The adapter in a training checkpoint, whose layers are stacked.

A checkpoint of a run with an adapter has the adapter and its optimizer state, and not the frozen
weights. ``state.json`` says where those are, and what they are.
"""

import hashlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.adapters.adapter import Adapter, Pair
from megatron_chameleon.checkpoint.names.adapters import MAGNITUDE, A, B, adapter_tensors
from megatron_chameleon.checkpoint.names.optimizer_state import AVERAGE, MAIN_WEIGHT, optimizer_key
from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import open_to_read, why_no_folder
from megatron_chameleon.values import Values

ENTRY = "adapter"
"""Of ``state.json``."""
_SAMPLE_BYTES = 1 << 20


def base_entry(folder: Path, files: Collection[str]) -> dict[str, Any]:
    """What ``state.json`` records of the base weights of an adapter.

    Args:
        folder: Theirs.
        files: Names of the files with the weights.
    """
    return {ENTRY: {"base": str(folder.absolute()), "fingerprint": fingerprint(folder, files)}}


def fingerprint(folder: Path, files: Collection[str]) -> str:
    """A hash of the names, sizes, beginnings and ends of files of weights, in seconds.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = hashlib.sha256()
    for name in sorted({*files, *(path.name for path in folder.glob("*.distcp"))}):
        with open_to_read(folder / name, CheckpointError) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            found.update(f"{name} {size}\n".encode())
            found.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()


def adapter_base(state: dict[str, Any], where: str) -> tuple[Path, str] | None:
    """Where the base weights of a checkpoint's adapter were, and their fingerprint.

    Args:
        state: Of ``state.json``.
        where: The checkpoint, for errors.

    Returns:
        None if the checkpoint has whole weights.
    """
    if state.get(ENTRY) is None:
        return None
    entry = Values(state, where, "Use another step").section(ENTRY)
    return Path(entry.text("base")), entry.text("fingerprint", longest=64)


def has_adapter(folder: Path) -> bool:
    """Whether a training checkpoint is of a run with an adapter."""
    return load_state(folder).get(ENTRY) is not None


def check_base(folder: Path, files: Collection[str], expected: str, adapter: str) -> None:
    """Refuse other weights than those that an adapter was trained on.

    Raises:
        CheckpointError: Their fingerprint differs.
    """
    found = fingerprint(folder, files)
    if found != expected:
        what = f"its fingerprint is {found[:12]}, and {adapter} was trained on weights with "
        remedy = "Give the folder that the run began with, unchanged (adapter.base)"
        raise CheckpointError(str(folder), f"{what}{expected[:12]}", remedy)


def missing_base(base: Path, adapter: str) -> CheckpointError:
    """The error for base weights that are not where they were."""
    what = f"{why_no_folder(base)}, and {adapter} is an adapter of the weights there"
    remedy = "Put them back, or say where they are: adapter.base=DIR for `chameleon train`, "
    remedy += "--base DIR for `chameleon convert --merge`"
    return CheckpointError(str(base), what, remedy)


def read_stored_adapter(checkpoint: TrainingCheckpoint, *, ema: bool = False) -> Adapter:
    """Open the adapter of a training checkpoint, in fp32 where it has that.

    Args:
        checkpoint: Of a run with an adapter.
        ema: Whether the moving average stands for the trained numbers.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    config, where = checkpoint.config.adapter, str(checkpoint.folder)
    model = checkpoint.config.model
    found: dict[str, dict[str, Any]] = {}
    for tensor in adapter_tensors(model, config.rank, config.target_modules, config.dora):
        stored = tensor.stored
        info = checkpoint.tensors.get(stored)
        if info is None or info.shape != (model.num_layers, *tensor.shape):
            state = "is missing" if info is None else f"is {list(info.shape)}"
            what = f"{stored} {state}, its config says {[model.num_layers, *tensor.shape]}"
            raise CheckpointError(where, what, "Use another step")
        for part in (AVERAGE,) if ema else (MAIN_WEIGHT,):
            if (key := optimizer_key(part, stored)) in checkpoint.optimizer_tensors:
                stored = key
        if ema and stored == tensor.stored:
            remedy = "Leave out --ema, or use a checkpoint of a run with training.ema_decay"
            raise CheckpointError(where, "has no EMA of the adapter", remedy)
        read = partial(checkpoint.read, stored, tensor.layer)
        found.setdefault(f"{tensor.target}.weight", {})[tensor.part] = read
    pairs = {
        name: Pair(parts[A], parts[B], config.alpha / config.rank, parts.get(MAGNITUDE))
        for name, parts in found.items()
    }
    base = adapter_base(checkpoint.state, where)
    return Adapter(where, config, pairs, str(base[0]) if base else None)
