"""Checkpoint formats: what each has on disk, and its way to and from megatron-core's layout."""

import importlib
from types import ModuleType

FORMATS = ("megatron", "deepspeed", "hf", "meta")
"""Names for ``--to``; each is a module of this folder with ``recognise``, ``Reader``, ``Writer``.

A folder may look like several formats, since transformers saves its own files beside DeepSpeed's.
The first one in this order counts: it has the optimizer's state too.
"""


def load_format(name: str) -> ModuleType:
    """The module of a format, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")
