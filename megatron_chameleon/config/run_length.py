"""``training.steps`` or ``training.epochs``: the one that was set last says how long a run is."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_chameleon.config.reading.interpolation import unresolved
from megatron_chameleon.config.reading.overrides import Override, apply_overrides

_STEPS, _EPOCHS = "training.steps", "training.epochs"


def settle_run_length(
    layers: Sequence[DictConfig], overrides: Sequence[Override]
) -> list[Override]:
    """What to add to the overrides, so that only the key that was set last remains.

    Both remain if one layer sets both, as the resolved config in a run folder does. Whether they
    agree is found when the data have been read.

    Args:
        layers: Preset and file, in this order.
        overrides: Words of the command line, which come after them.
    """
    own = OmegaConf.create({"training": {}})
    apply_overrides(own, [word for word in overrides if _is_of_training(word)])
    kept: set[str] = set()
    for layer in (*layers, own):
        section = unresolved(layer).get("training")
        values: dict[str, Any] = section if isinstance(section, dict) else {}
        kept = {key for key in (_STEPS, _EPOCHS) if _is_set(values, key)} or kept
    if kept == {_EPOCHS}:
        return [Override(_STEPS, "0")]
    return [Override(_EPOCHS, "null")] if kept == {_STEPS} else []


def _is_of_training(word: Override) -> bool:
    return word.key in ("training", _STEPS, _EPOCHS)


def _is_set(values: dict[str, Any], key: str) -> bool:
    value = values.get(key.partition(".")[2])
    return value is not None and not (key == _STEPS and value == 0)
