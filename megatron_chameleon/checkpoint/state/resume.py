"""Choose the checkpoint that a run resumes from, and check that it is sound and fits the config."""

import json
import logging
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.state.folders import (
    STATE_FILE,
    list_checkpoints,
    list_step_folders,
    load_checkpoint_config,
    load_state,
    other_format,
)
from megatron_chameleon.checkpoint.state.integrity import find_damage, find_damage_of_small_files
from megatron_chameleon.checkpoint.state.save import CheckpointedEngine
from megatron_chameleon.config.checks.check import get_value
from megatron_chameleon.config.differences import find_differences
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.collectives import first_message

logger = logging.getLogger(__name__)

_RUN_DIR = "logging.run_dir"
# A resumed run must share these with its checkpoint: the model's shape and the seed. Layout,
# engine, optimizer and dtype may all change. The mixture's history checks what the order of the
# data depends on.
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
# A run must share these with a checkpoint of weights alone, or with one that was trained elsewhere.
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
    """Choose the checkpoint to resume from; only its small files are read.

    Args:
        folder: The run's ``checkpoints/`` folder.
        resume: ``auto`` for the newest sound checkpoint, ``never``, or a path. A path outside the
            folder is where the run begins. Once the run has a checkpoint of its own, that one is
            taken, so that repeating the same command resumes the run.

    Raises:
        CheckpointError: The path is not a sound checkpoint, none of the run's checkpoints is sound,
            or ``never`` would overwrite a run.
    """
    if resume == "never":
        found = list_checkpoints(folder)
        if found:
            what = f"the run folder already holds a run up to {found[-1].name}"
            raise CheckpointError(
                str(folder), what, "Use --resume auto or another logging.run_dir, or remove the run"
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
        raise _not_a_checkpoint(checkpoint)
    damage = find_damage_of_small_files(checkpoint)
    if damage:
        raise CheckpointError(str(checkpoint), damage, "Use an older checkpoint")
    return checkpoint


def _not_a_checkpoint(path: Path) -> CheckpointError:
    what = f"This is not a whole checkpoint: it has no {STATE_FILE}"
    remedy = "Give a folder such as runs/NAME/checkpoints/step_..."
    if not path.is_dir():
        what = "There is no such folder"
    elif format_name := other_format(path):
        what = f"This is a {format_name} folder"
        remedy = f"Run `chameleon convert {path} DST --to megatron` first"
    return CheckpointError(str(path), what, remedy)


def find_sound(folder: Path, chosen: Path, resume: str) -> Path:
    """Check all files of the chosen checkpoint, and fall back to an older one if some are damaged.

    A collective: the ranks share the reading. In the run's own folder, damaged checkpoints get the
    suffix ``.damaged`` once an older one is found to be sound, and rank 0 logs a warning for each.

    Args:
        folder: The run's ``checkpoints/`` folder.
        chosen: The checkpoint that ``find_resume`` chose.
        resume: The same as for ``find_resume``. A checkpoint that the user named is never replaced
            by another one.

    Returns:
        The newest sound checkpoint.

    Raises:
        CheckpointError: On every rank, if none is sound, or if the named one is not.
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
    """On rank 0, rename damaged checkpoints so that nobody takes them for whole ones."""
    torch.distributed.barrier()  # until every rank has read them
    if torch.distributed.get_rank() != 0:
        return
    for checkpoint, damage in damages.items():
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
        checkpoint.rename(aside)
        logger.warning(
            "%s. It is now called %s; the run resumes from %s", damage, aside.name, sound.name
        )


def _none_is_sound(folder: Path, damages: list[str]) -> CheckpointError:
    what = f"none of {len(damages)} checkpoints is sound: {'; '.join(damages)}"
    remedy = "Restore one of them, or start again in another logging.run_dir"
    return CheckpointError(str(folder), what, remedy)


def check_fits(checkpoint: Path, config: Config, tokenizer_fingerprint: str) -> None:
    """Refuse to resume a run from a checkpoint of another model, seed or tokenizer.

    Raises:
        CheckpointError: It names every value that differs.
    """
    state, old = load_state(checkpoint), load_checkpoint_config(checkpoint)
    weights_only = state.get("optimizer") is False
    same_run = not weights_only and state.get("training_config") is not False
    differing = [
        key
        for key in (_FIXED if same_run else _FIXED_WEIGHTS)
        if _resolved(config, key) != _resolved(old, key)
    ]
    if _scales_are_unreadable(config.fp8, old.fp8):
        differing.append("fp8.emulate")
    found = [
        f"{key}={_as_yaml(get_value(old, key))} (your config: {_as_yaml(get_value(config, key))})"
        for key in differing
    ]
    if state["tokenizer_fingerprint"] != tokenizer_fingerprint:
        found.append("a different tokenizer")
    if found:
        other = "train into another logging.run_dir" if same_run else "use another checkpoint"
        raise CheckpointError(
            str(checkpoint),
            f"The checkpoint has {', '.join(found)}",
            f"Set {'it' if len(found) == 1 else 'them'} in your config, or {other}",
        )
    if state["step"] > config.training.steps and not weights_only:
        what = f"The checkpoint is at step {state['step']}, beyond training.steps "
        what += str(config.training.steps)
        raise CheckpointError(str(checkpoint), what, "Raise training.steps")


def _as_yaml(value: object) -> str:
    """A value as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _scales_are_unreadable(new: Fp8Config, old: Fp8Config) -> bool:
    """Whether the FP8 scales are stored in the other implementation's form.

    Emulation and Transformer Engine each store the state of delayed scaling in their own form.
    """
    has_state = old.format is not None and old.recipe == "delayed"
    reads_state = new.format is not None or platform.has_transformer_engine()
    return has_state and reads_state and new.emulate != old.emulate


def _resolved(config: Config, key: str) -> object:
    """The value of ``section.key``, or the number of heads where null stands for it."""
    value = get_value(config, key)
    if value is None and key in ("model.num_query_groups", "model.qk_norm_groups"):
        return config.model.num_attention_heads
    return value


def changed_settings(checkpoint: Path | None, config: Config) -> str:
    """The settings that a config changes since a checkpoint, in one line.

    Args:
        checkpoint: None where the run begins.
        config: The run's config.

    Returns:
        Such as ``optimizer.lr 0.001 -> 0.002``; empty if nothing that matters differs.
    """
    if checkpoint is None or load_state(checkpoint).get("training_config") is False:
        return ""
    differences = find_differences(load_checkpoint_config(checkpoint), config)
    return ", ".join(
        f"{key} {old} -> {new}" for key, (old, new) in differences.items() if key != _RUN_DIR
    )


def load(checkpoint: Path, engine: CheckpointedEngine) -> int:
    """Fill the engine from a checkpoint.

    A checkpoint without optimizer state, as a conversion writes it, only provides the first weights
    of a new run.

    Returns:
        The number of updates done.

    Raises:
        CheckpointError: A file is missing, damaged or of another shape.
    """
    state = load_state(checkpoint)
    if state.get("optimizer") is False:
        engine.restore_weights(checkpoint)
        return 0
    engine.restore(checkpoint, state["step"])
    return int(state["step"])
