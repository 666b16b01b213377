"""Files of weights beside those that are read: an adapter is refused, all others are named."""

import re
from collections.abc import Collection
from pathlib import Path

from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.values import printable

LISTED = 5
_WEIGHTS = r"(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|npz|onnx)"
_HOLDS_WEIGHTS = re.compile(rf".*\.{_WEIGHTS}", re.IGNORECASE)
_ADAPTER = re.compile(
    rf"adapters?(_config|_model)?([-_.].*)?\.(json|{_WEIGHTS})"
    rf"|(.*[-_.])?(q?lora|dora|ia3)([-_.].*)?\.{_WEIGHTS}",
    re.IGNORECASE,
)
_OF_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pth?)")
"""What transformers' trainer saves beside the weights."""


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, such as LoRA's: the weights without it are another model.

    Raises:
        CheckpointError: It names the adapter's files.
    """
    if names := sorted(path.name for path in folder.iterdir() if _ADAPTER.fullmatch(path.name)):
        raise CheckpointError(
            str(folder),
            f"has {_listed(names)}: an adapter, which is not merged into the weights",
            "Merge it first (merge_and_unload() of peft), or move it away to use the weights "
            "without it",
        )


def unused_weights(folder: Path, used: Collection[str]) -> str:
    """The names of other files of weights in a folder, for a message; empty if there are none.

    Args:
        folder: A checkpoint.
        used: The names of the files that are read.
    """
    names = sorted(
        path.name
        for path in folder.iterdir()
        if _HOLDS_WEIGHTS.fullmatch(path.name)
        and not _OF_TRAINERS.fullmatch(path.name)
        and path.name not in used
    )
    return _listed(names) if names else ""


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:LISTED])
    return f"{shown} and {len(names) - LISTED:,} more" if names[LISTED:] else shown
