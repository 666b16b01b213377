"""Checkpoint folders by their names and small files; the tensors are not opened.

A ``step_00001000`` folder is whole if it has ``state.json``, which is written last.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chameleon.config.load import load_recorded_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import read_json_object
from megatron_chameleon.values import LARGEST_COUNT, Values, describe

STATE_FILE = "state.json"
STATE_FORMAT = "megatron_chameleon.checkpoint/1"
LARGEST_STATE_BYTES = 16 << 20
STEP_FOLDER = re.compile(r"step_\d{8,}")
_FOREIGN_FILES = {
    "latest": "DeepSpeed",
    "latest_universal": "DeepSpeed",
    "config.json": "Hugging Face",
    "params.json": "Meta",
}
"""Files that only another format's folders have, and the name of that format."""
_WEIGHT_FORMATS = ("Hugging Face", "Meta")


def step_folder(step: int) -> str:
    """The folder name for a step, such as ``step_00001000``."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    return int(folder.name.removeprefix("step_"))


def list_step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a ``checkpoints/`` folder, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(steps, key=step_of)


def other_format(folder: Path) -> str | None:
    """The name of another checkpoint format that a folder seems to have; None: none is known."""
    for name, format_name in _FOREIGN_FILES.items():
        if (folder / name).is_file():
            return format_name
    return None


def has_only_weights(folder: Path) -> bool:
    """Whether a folder has a format without optimizer state, so that only weights can be meant."""
    return not (folder / STATE_FILE).is_file() and other_format(folder) in _WEIGHT_FORMATS


def load_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a whole checkpoint.

    Raises:
        CheckpointError: The file is missing, is not JSON, has another format, lacks a key that
            readers need, or has a value of another type or range.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            str(folder), f"no {STATE_FILE}: the checkpoint is not whole", "Give another step"
        )
    state = read_json_object(file, CheckpointError, LARGEST_STATE_BYTES)
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            str(file),
            f"format is {describe(state.get('format'))}, this version reads {STATE_FORMAT!r}",
            "Use the version of megatron_chameleon that wrote it",
        )
    values = Values(state, str(file), "Use another step")
    state["step"] = values.whole("step", high=LARGEST_COUNT)
    state["vocab_size"] = values.whole("vocab_size", low=1)
    state["tokenizer_fingerprint"] = values.text("tokenizer_fingerprint", None)
    for key in ("optimizer", "training_config", "has_checksums", "trained_on_conversations"):
        values.flag(key, None)
    values.section("data", {})
    values.wholes("skipped_steps", high=LARGEST_COUNT)
    state["ema_updates"] = values.whole("ema_updates", high=LARGEST_COUNT, default=0)
    return state


def trained_on_conversations(state: Mapping[str, Any]) -> bool | None:
    """Whether a model has been trained on conversations, and so knows how a prompt ends.

    Args:
        state: ``state.json`` of its checkpoint. Earlier versions did not record it there; the token
            files that it names then say it, if they are still where they were.

    Returns:
        None if neither says it.
    """
    if (recorded := state.get("trained_on_conversations")) is not None:
        return bool(recorded)
    found: list[bool | None] = []
    for entry in (state.get("data") or {}).get("entries") or ():
        sources = entry.get("sources") if isinstance(entry, dict) else None
        for source in sources.values() if isinstance(sources, dict) else ():
            prefix = source.get("prefix") if isinstance(source, dict) else None
            found.append(_has_answers(prefix) if isinstance(prefix, str) else None)
    if True in found:
        return True
    return None if None in found or not found else False


def _has_answers(prefix: str) -> bool | None:
    """Whether a token file holds answers; None if its description cannot be read."""
    try:
        content = read_json_object(Path(f"{prefix}.json"), CheckpointError, LARGEST_STATE_BYTES)
    except CheckpointError:
        return None
    return bool(content.get("answers"))


def load_checkpoint_config(folder: Path) -> Config:
    """Read the training config that is stored in a checkpoint.

    Raises:
        CheckpointError: There is no ``config.yaml``.
        ConfigError: It does not fit this version's config.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(str(folder), "no config.yaml", "Use another step of the run")
    return load_recorded_config(file)


def flush_to_disk(path: Path) -> None:
    """Make sure that a file or folder survives a crash of the machine.

    Raises:
        OSError: It cannot be read or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
