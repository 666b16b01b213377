"""Save, find, load and prune the checkpoints of a run: whole or not there.

A checkpoint is written under a hidden name and renamed when everything in it, ``state.json`` last,
has reached the disk. It is renamed back before it is deleted. So whatever is called
``step_00001000`` is whole, whenever the job is killed. What lies in it is the engine's own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_chameleon.checkpoint.folders import (
    STATE_FILE,
    STATE_FORMAT,
    list_checkpoints,
    load_checkpoint_config,
    load_state,
)
from megatron_chameleon.config.check import get_value
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel import platform

SPARE_BYTES = 32 * 2**20  # for indices, configs and the file system's own needs

# What a resumed run must share with its checkpoint: the model's shape and the seed. Layout, engine,
# optimizer and dtype may all change. The data's history knows what its order depends on.
_FIXED = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.seq_length",
    "model.norm_order",
    "model.qk_norm_groups",
    "training.seed",
)
# What a run that starts from weights alone must share with them, or one that takes over what others
# have trained
_FIXED_WEIGHTS = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.norm_order",
    "model.qk_norm_groups",
    "model.rotary_base",
    "model.layernorm_epsilon",
)


class Snapshot(Protocol):
    """A training state that is about to be written."""

    @property
    def local_bytes(self) -> int:
        """What this rank will write."""

    def write(self, folder: Path) -> None:
        """Write into a folder that is there; ``OSError`` on one rank or more if it failed."""


class Engine(Protocol):
    """What the store needs of a training engine."""

    config: Config

    def snapshot(self) -> Snapshot: ...

    def restore(self, checkpoint: Path, step: int) -> None: ...

    def restore_weights(self, checkpoint: Path) -> None: ...


def find_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: The run's ``checkpoints/`` folder.
        resume: ``auto`` for the newest whole one, ``never``, or a path. A path outside the folder
            is where the run begins: once it has a checkpoint of its own, that is taken, so that
            the same command goes on.

    Raises:
        CheckpointError: The path is no whole checkpoint, or ``never`` would overwrite a run.
    """
    found = list_checkpoints(folder)
    if resume == "never":
        if found:
            what = f"the run folder already holds a run up to {found[-1].name}"
            raise CheckpointError(
                str(folder), what, "Use --resume auto, or another logging.run_dir, or remove it"
            )
        return None
    if resume == "auto":
        return found[-1] if found else None
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        what = f"no whole checkpoint (it has no {STATE_FILE})"
        raise CheckpointError(resume, what, "Give a folder such as runs/NAME/checkpoints/step_...")
    if found and path.resolve().parent != folder.resolve():
        return found[-1]
    return path


def check_fits(checkpoint: Path, config: Config, tokenizer_fingerprint: str) -> None:
    """Refuse to resume a run from a checkpoint of another model, seed, batch or tokenizer.

    Raises:
        CheckpointError: It names every value that differs.
    """
    state, old = load_state(checkpoint), load_checkpoint_config(checkpoint)
    weights_only = state.get("optimizer") is False
    same_run = not weights_only and state.get("training_config") is not False
    differences = [
        f"{key} is {get_value(config, key)} and was {get_value(old, key)}"
        for key in (_FIXED if same_run else _FIXED_WEIGHTS)
        if _resolved(config, key) != _resolved(old, key)
    ]
    if _scales_are_unreadable(config.fp8, old.fp8):
        differences.append(f"fp8.emulate is {config.fp8.emulate} and was {old.fp8.emulate}")
    if state["tokenizer_fingerprint"] != tokenizer_fingerprint:
        differences.append("the tokenizer is another one")
    if differences:
        remedy = "Put the old values back, or train into another logging.run_dir"
        raise CheckpointError(str(checkpoint), "; ".join(differences), remedy)
    if state["step"] > config.training.steps and not weights_only:
        what = f"it is at step {state['step']}, behind training.steps {config.training.steps}"
        raise CheckpointError(str(checkpoint), what, "Raise training.steps")


def _scales_are_unreadable(new: Fp8Config, old: Fp8Config) -> bool:
    """Emulation and Transformer Engine keep delayed scaling's state in forms of their own."""
    has_state = old.format is not None and old.recipe == "delayed"
    reads_state = new.format is not None or platform.has_transformer_engine()
    return has_state and reads_state and new.emulate != old.emulate


def _resolved(config: Config, key: str) -> object:
    """The value of ``section.key``, with null where it stands for the number of heads."""
    value = get_value(config, key)
    if value is None and key in ("model.num_query_groups", "model.qk_norm_groups"):
        return config.model.num_attention_heads
    return value


def save(folder: Path, step: int, engine: Engine, extra: dict[str, Any]) -> Path:
    """Save a checkpoint and delete the oldest ones. A collective: every rank calls it.

    Args:
        folder: The run's ``checkpoints/`` folder.
        step: Updates done.
        engine: Its state is saved, and its config beside it.
        extra: Further entries of ``state.json``, those of the tokenizer and of the data.

    Raises:
        CheckpointError: On every rank, if any could not write; the folder then holds what it held
            before.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.saving"
    snapshot = engine.snapshot()
    _together(final, lambda: _make_room(folder, temporary, snapshot.local_bytes))
    try:
        _together(final, lambda: snapshot.write(temporary))
    except CheckpointError:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    _together(final, lambda: _finish(temporary, final, step, engine.config, extra))
    if torch.distributed.get_rank() == 0:
        for old in list_checkpoints(folder)[: -engine.config.checkpoint.keep_last]:
            delete(old)
    return final


def load(checkpoint: Path, engine: Engine) -> int:
    """Fill the engine from a checkpoint; returns the number of updates done.

    A checkpoint without optimizer state, as a conversion writes it, gives its weights to a run that
    begins.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    state = load_state(checkpoint)
    if state.get("optimizer") is False:
        engine.restore_weights(checkpoint)
        return 0
    engine.restore(checkpoint, state["step"])
    return int(state["step"])


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; an interrupted deletion leaves nothing that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _make_room(folder: Path, temporary: Path, local_bytes: int) -> None:
    """Clear what interrupted saves and deletions left, and see that the new checkpoint has room."""
    sizes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, local_bytes)
    if torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free, total = shutil.disk_usage(folder).free, sum(sizes) + SPARE_BYTES
    if free < total:
        raise OSError(f"disk full: {free:,} bytes are free and {total:,} are needed")
    temporary.mkdir()


def _finish(temporary: Path, final: Path, step: int, config: Config, extra: dict[str, Any]) -> None:
    """Rank 0: write the config and ``state.json``, and give the checkpoint its name."""
    if torch.distributed.get_rank() != 0:
        return
    try:
        save_config(config, temporary / "config.yaml")
        values = {"format": STATE_FORMAT, "step": step, **extra}
        (temporary / STATE_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():
            delete(final)
        temporary.rename(final)
        _sync(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(final: Path, action: Any) -> None:
    """Run ``action`` on every rank; if it failed on any, all of them raise the first failure."""
    failure = None
    try:
        action()
    except OSError as error:
        failure = _first_line(error)
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    first = next((f for f in failures if f), None)
    if first:
        remedy = (
            "Free disk space and start again with --resume auto; older checkpoints are untouched"
        )
        raise CheckpointError(str(final), f"could not be saved: {first}", remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
