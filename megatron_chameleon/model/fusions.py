"""Which fused kernels a model uses on this machine: the one place that chooses.

A fusion runs by itself (``null`` in the config) only where it is known to pay.
"""

import dataclasses
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron_chameleon.config.checks.fusion import fusion_conflicts
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel import platform


@dataclass(frozen=True)
class Fusions:
    """What ``FusionConfig`` asks for, decided for this machine."""

    apply_rope_fusion: bool
    bias_dropout_fusion: bool
    bias_activation_fusion: bool
    gradient_accumulation_fusion: bool
    loss_fusion: bool
    qk_norm_rope_fusion: bool


NAMES = tuple(field.name for field in dataclasses.fields(Fusions))
KNOWN_TO_PAY = (
    "apply_rope_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "gradient_accumulation_fusion",
)
"""On by themselves where they can run: megatron-core's, which its own training has on by default.
Ours join them once a gain is measured."""


def select_fusions(config: Config) -> Fusions:
    """Decide for this machine; a fusion that is asked for by ``true`` is taken at its word, because
    ``check_fusions`` and ``fusion_problems`` have refused it where it cannot run."""
    wanted = dataclasses.asdict(config.fusion)
    conflicts = fusion_conflicts(config)
    chosen = {
        name: (name in KNOWN_TO_PAY and name not in conflicts and obstacle(name) is None)
        if wanted[name] is None
        else wanted[name]
        for name in NAMES
    }
    if chosen["qk_norm_rope_fusion"] and wanted["apply_rope_fusion"] is None:
        chosen["apply_rope_fusion"] = False  # the same work
    return Fusions(**chosen)


def fusion_names(config: Config) -> list[str]:
    """The chosen ones, for people."""
    chosen = dataclasses.asdict(select_fusions(config))
    return [name.removesuffix("_fusion") for name, on in chosen.items() if on]


def fusion_problems(config: Config) -> Iterator[ConfigError]:
    """Fusions that the config demands and this machine cannot run."""
    for name in NAMES:
        if getattr(config.fusion, name) and (what := obstacle(name)):
            remedy = "Set it to null to have it where it can run, or to false"
            yield ConfigError(f"fusion.{name}", f"true {what}", remedy)


def obstacle(name: str) -> str | None:
    """What this machine lacks for a fusion, as the end of a sentence; None: nothing."""
    return _OBSTACLES[name]()


def add_weight_gradients_in_products(model: nn.Module) -> None:
    """Let the matrix products of Transformer Engine's layers add to ``main_grad`` themselves.

    megatron-core's config has a switch for this, ``gradient_accumulation_fusion``. It would reach
    megatron-core's own output layer too, which raises unless an extension of apex is installed. So
    the switch stays off, and only the layers that can do it are told: they read their attribute in
    each forward pass. Call it where gradient buffers are made: without ``main_grad`` the layers'
    backward pass fails.

    Args:
        model: One part of the model.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            switchable: Any = module
            switchable.fuse_wgrad_accumulation = True


def _no_gpu() -> str | None:
    return None if platform.has_gpu() else "needs a GPU, and this machine has none"


def _no_transformer_engine() -> str | None:
    if no_gpu := _no_gpu():
        return no_gpu
    if platform.has_transformer_engine():
        return None
    return "needs Transformer Engine, and it cannot be imported here"


def _no_triton() -> str | None:
    """Triton compiles kernels by itself, and the code that starts them with the machine's C
    compiler and Python's headers. torch.compile needs all of it on a GPU."""
    if no_gpu := _no_gpu():
        return no_gpu
    if not importlib.util.find_spec("triton"):
        return "needs the package triton, which is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler for triton, and there is neither gcc nor clang nor CC"
    folders = _header_folders()
    if not any((folder / "Python.h").is_file() for folder in folders):
        return f"needs Python's headers for triton, and {folders[0]} has no Python.h"
    return None


def _header_folders() -> list[Path]:
    """Where the compiler looks for Python.h. Source: triton/runtime/build.py, and gcc's manual."""
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme names a folder for what is installed on top, without the headers
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)
    named = (os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [folder for value in named for folder in value.split(os.pathsep) if folder]
    return [Path(folder) for folder in (paths["include"], *folders)]


_OBSTACLES: dict[str, Callable[[], str | None]] = {
    "apply_rope_fusion": _no_transformer_engine,
    "bias_dropout_fusion": _no_triton,
    "bias_activation_fusion": _no_triton,
    "gradient_accumulation_fusion": _no_transformer_engine,
    "loss_fusion": _no_triton,
    "qk_norm_rope_fusion": _no_triton,
}
