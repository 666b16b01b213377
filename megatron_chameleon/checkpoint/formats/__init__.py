"""Checkpoint formats: what each has on disk, and its way to and from megatron-core's layout."""

import importlib
from types import ModuleType

FORMATS = ("megatron", "deepspeed", "hf", "meta")
"""Names for ``--to``; each is a module of this folder with ``recognise``, ``Source``, ``Sink``.

A folder may look like several, as transformers saves its own files beside DeepSpeed's: the first
counts, which has the optimizer's state too.
"""


def load_format(name: str) -> ModuleType:
    """The module of a format, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{name}")
