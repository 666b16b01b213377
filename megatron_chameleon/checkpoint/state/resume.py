"""Check that a checkpoint fits the config of the run that resumes from it, and load it."""

import json
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config, load_state
from megatron_chameleon.checkpoint.state.save import CheckpointedEngine
from megatron_chameleon.config.checks.check import get_value
from megatron_chameleon.config.differences import find_differences
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.parallel import platform

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
    "adapter.rank",
    "adapter.alpha",
    "adapter.target_modules",
    "adapter.dora",
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
    if not weights_only and config.optimizer.name != old.optimizer.name:
        raise _other_optimizer(checkpoint, old.optimizer.name, config.optimizer.name)
    if config.training.steps:  # 0: the data say it
        check_step(checkpoint, config)


def check_step(checkpoint: Path, config: Config) -> None:
    """Refuse a checkpoint beyond the last step of the config.

    Raises:
        CheckpointError: It is.
    """
    state = load_state(checkpoint)
    if state["step"] > config.training.steps and state.get("optimizer") is not False:
        what = f"The checkpoint is at step {state['step']}, beyond training.steps "
        what += str(config.training.steps)
        name = "steps" if config.training.epochs is None else "epochs"
        raise CheckpointError(str(checkpoint), what, f"Raise training.{name}")


def _other_optimizer(checkpoint: Path, old: str, new: str) -> CheckpointError:
    return CheckpointError(
        str(checkpoint),
        f"Its moments are those of optimizer.name={old}, not of your config's {new}",
        "Set it in your config, or begin a new run with its weights, which `chameleon convert "
        f"{checkpoint} DST --to megatron --no-optimizer` writes",
    )


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


def changed_settings(checkpoint: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that a config changes since a checkpoint.

    Args:
        checkpoint: One of the run, with a config.
        config: The run's config.

    Returns:
        The old and the new value of each key.
    """
    differences = find_differences(load_checkpoint_config(checkpoint), config)
    return {key: values for key, values in differences.items() if key != _RUN_DIR}


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
