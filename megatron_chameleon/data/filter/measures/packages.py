"""Packages of the extra ``curation``, imported when a filter needs them."""

import importlib
from typing import Any

from megatron_chameleon.errors import ConfigError

_PROJECTS = {"imagehash": "ImageHash"}


def needed(module: str, option: str) -> Any:
    """Import a module.

    Args:
        module: Its name.
        option: The option that needs it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = (
            f"needs the package {_PROJECTS.get(module, module)}, which cannot be imported ({error})"
        )
        remedy = "Install it with: pip install 'megatron-chameleon[curation]'"
        raise ConfigError(option, what, remedy) from error
