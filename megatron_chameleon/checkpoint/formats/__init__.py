"""Checkpoint formats: what each has on disk, and its way to and from megatron-core's form."""

import importlib
from types import ModuleType

FORMATS = {
    "megatron": "megatron-core",
    "deepspeed": "DeepSpeed",
    "hf": "Hugging Face",
    "meta": "Meta",
}
"""Each format's name for ``--to``, and its name in messages.

Each format is a module of this folder with ``recognise``, ``Reader`` and ``Writer``. A folder may
look like several formats, since transformers saves its own files beside DeepSpeed's. The first one
in this order counts: it has the optimizer's state too.
"""


def load_format(name: str) -> ModuleType:
    """Import the module of a format, only when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")
