"""Train, convert, serve and evaluate mixed-modal early-fusion models (arXiv 2405.09818).

    from megatron_chameleon import Session, convert, train

    train("train.yaml", ["training.steps=1000"])
    convert("runs/mine", "exported", to="hf")
    (image,) = Session.load("exported").draw(["a red square"])

Importing the package imports none of the heavy libraries; each name below is imported when it is
used first.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chameleon.checkpoint.convert.run import ConversionResult, convert
    from megatron_chameleon.config.load import load_config
    from megatron_chameleon.errors import (
        ChameleonError,
        CheckpointError,
        ConfigError,
        ConfigErrors,
        DataError,
        TrainingError,
    )
    from megatron_chameleon.inference.answers.answer import Answer
    from megatron_chameleon.inference.engine.modality import Force
    from megatron_chameleon.inference.engine.options import GenerationOptions
    from megatron_chameleon.inference.session import Session
    from megatron_chameleon.training.start import train

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "ChameleonError",
    "CheckpointError",
    "ConfigError",
    "ConfigErrors",
    "ConversionResult",
    "DataError",
    "Force",
    "GenerationOptions",
    "Session",
    "TrainingError",
    "convert",
    "load_config",
    "train",
]

_MODULES = {
    "Answer": "inference.answers.answer",
    "ConversionResult": "checkpoint.convert.run",
    "Force": "inference.engine.modality",
    "GenerationOptions": "inference.engine.options",
    "Session": "inference.session",
    "convert": "checkpoint.convert.run",
    "load_config": "config.load",
    "train": "training.start",
}
"""Where a name of ``__all__`` is defined; the errors are in ``errors``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
