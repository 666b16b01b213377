"""Which checkpoint a run goes on from, whether it fits, and whether it is sound."""

import sys
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    list_checkpoints,
    list_step_folders,
    load_checkpoint_config,
    load_state,
)
from megatron_chameleon.checkpoint.state.integrity import find_damage, find_damage_of_small_files
from megatron_chameleon.checkpoint.state.save import CheckpointedEngine
from megatron_chameleon.config.checks.check import get_value
from megatron_chameleon.config.differences import find_differences
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import first_message

_RUN_DIR = "logging.run_dir"
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


def find_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint to resume from, by a look at its small files.

    Args:
        folder: The run's ``checkpoints/`` folder.
        resume: ``auto`` for the newest sound one, ``never``, or a path. A path outside the folder
            is where the run begins: once it has a checkpoint of its own, that is taken, so that
            the same command goes on.

    Raises:
        CheckpointError: The path is no sound checkpoint, the run has some and none is sound, or
            ``never`` would overwrite a run.
    """
    if resume == "never":
        found = list_checkpoints(folder)
        if found:
            what = f"the run folder already holds a run up to {found[-1].name}"
            raise CheckpointError(
                str(folder), what, "Use --resume auto, or another logging.run_dir, or remove it"
            )
        return None
    if resume != "auto":
        given = _check_given(Path(resume))
        if _is_in(folder, given) or not list_checkpoints(folder):
            return given
    damages = []
    for checkpoint in reversed(list_step_folders(folder)):
        damage = find_damage_of_small_files(checkpoint)
        if damage is None:
            return checkpoint
        damages.append(damage)
    if damages:
        raise _none_is_sound(folder, damages)
    return None


def _is_in(folder: Path, checkpoint: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def _check_given(checkpoint: Path) -> Path:
    if not (checkpoint / STATE_FILE).is_file():
        what = f"no whole checkpoint (it has no {STATE_FILE})"
        remedy = "Give a folder such as runs/NAME/checkpoints/step_..."
        raise CheckpointError(str(checkpoint), what, remedy)
    damage = find_damage_of_small_files(checkpoint)
    if damage:
        raise CheckpointError(str(checkpoint), damage, "Use an older checkpoint")
    return checkpoint


def find_sound(folder: Path, chosen: Path, resume: str) -> Path:
    """The checkpoint that ``find_resume`` chose, or the newest older one if its files are damaged.

    A collective: the ranks read all of its files together. In the run's own folder, a damaged
    checkpoint gets the ending ``.damaged`` once an older one was found to be sound, and rank 0
    says so.

    Args:
        folder: The run's ``checkpoints/`` folder.
        chosen: By ``find_resume``.
        resume: As it was asked for; a checkpoint that was named is not replaced by another one.

    Raises:
        CheckpointError: On every rank: none is sound, or the named one is not.
    """
    if resume != "auto" and Path(resume).resolve() == chosen.resolve():
        damage = _find_damage(chosen)
        if damage:
            raise CheckpointError(str(chosen), damage, "Use another checkpoint")
        return chosen
    damages: dict[Path, str] = {}
    for checkpoint in reversed(list_step_folders(folder)):
        damage = _find_damage(checkpoint)
        if damage is None:
            _set_aside(damages, checkpoint)
            return checkpoint
        damages[checkpoint] = damage
    raise _none_is_sound(folder, list(damages.values()))


def _find_damage(checkpoint: Path) -> str | None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return first_message(find_damage(checkpoint, rank, world_size))


def _set_aside(damages: dict[Path, str], sound: Path) -> None:
    """Rank 0: put damaged checkpoints where no one takes them for whole ones."""
    torch.distributed.barrier()  # everyone has seen them
    if torch.distributed.get_rank() != 0:
        return
    for checkpoint, damage in damages.items():
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
        checkpoint.rename(aside)
        words = f"{damage}. It is now called {aside.name}; the run goes on from {sound.name}"
        print(f"warning: {words}", file=sys.stderr, flush=True)


def _none_is_sound(folder: Path, damages: list[str]) -> CheckpointError:
    what = f"none of {len(damages)} checkpoints is sound: {'; '.join(damages)}"
    remedy = "Restore one of them, or start anew in another logging.run_dir"
    return CheckpointError(str(folder), what, remedy)


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


def changed_settings(checkpoint: Path | None, config: Config) -> str:
    """What a config changes against that of a checkpoint, in a line; empty: nothing that counts."""
    if checkpoint is None or load_state(checkpoint).get("training_config") is False:
        return ""
    differences = find_differences(load_checkpoint_config(checkpoint), config)
    return ", ".join(
        f"{key} {old} -> {new}" for key, (old, new) in differences.items() if key != _RUN_DIR
    )


def load(checkpoint: Path, engine: CheckpointedEngine) -> int:
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
