"""Choose the fused kernels that a model uses on this machine.

If the config leaves a fusion at ``null``, it is used only where it is known to pay.
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
    """The choices of ``FusionConfig``, decided for this machine."""

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
"""On by default where they can run. These are megatron-core's own, which its training has on by
default. Our fusions join the list once a gain has been measured."""


def select_fusions(config: Config) -> Fusions:
    """Choose the fusions for this machine.

    One that the config sets to ``true`` is chosen without checks, because ``check_fusions`` and
    ``fusion_problems`` have already refused it where it cannot run.
    """
    wanted = dataclasses.asdict(config.fusion)
    conflicts = fusion_conflicts(config)
    chosen = {
        name: (name in KNOWN_TO_PAY and name not in conflicts and obstacle(name) is None)
        if wanted[name] is None
        else wanted[name]
        for name in NAMES
    }
    if chosen["qk_norm_rope_fusion"] and wanted["apply_rope_fusion"] is None:
        chosen["apply_rope_fusion"] = False  # it would do the same work
    return Fusions(**chosen)


def fusion_names(config: Config) -> list[str]:
    """The chosen fusions, as short names for people."""
    chosen = dataclasses.asdict(select_fusions(config))
    return [name.removesuffix("_fusion") for name, on in chosen.items() if on]


def fusion_problems(config: Config) -> Iterator[ConfigError]:
    """Errors for the fusions that the config demands and this machine cannot run."""
    for name in NAMES:
        if getattr(config.fusion, name) and (what := obstacle(name)):
            remedy = "Set it to null to use it only where it can run, or to false"
            yield ConfigError(f"fusion.{name}", f"true {what}", remedy)


def obstacle(name: str) -> str | None:
    """What this machine lacks for a fusion, as the end of a sentence; None if it lacks nothing."""
    return _OBSTACLES[name]()


def add_weight_gradients_in_products(model: nn.Module) -> None:
    """Let the matrix products of Transformer Engine's layers add to ``main_grad`` directly.

    megatron-core's config has a switch for this, ``gradient_accumulation_fusion``. But it also
    affects megatron-core's own output layer, which raises an error unless an extension of apex is
    installed. So the switch stays off, and this function sets the attribute of the layers that
    support it, which they read in each forward pass. Call it only where gradient buffers exist:
    without ``main_grad`` the layers' backward pass fails. Frozen weights have none.

    Args:
        model: One part of the model.
    """
    for module in model.modules():
        weights = module.parameters(recurse=False)
        if hasattr(module, "fuse_wgrad_accumulation") and all(p.requires_grad for p in weights):
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
    """What Triton lacks here. torch.compile needs it, too, on a GPU.

    Triton compiles the kernels itself. For the code that launches them, it needs a C compiler and
    Python's headers.
    """
    if no_gpu := _no_gpu():
        return no_gpu
    if not importlib.util.find_spec("triton"):
        return "needs the package triton, which is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler for triton, but there is no gcc or clang, and CC is not set"
    folders = _header_folders()
    if not any((folder / "Python.h").is_file() for folder in folders):
        return f"needs Python's headers for triton, but {folders[0]} has no Python.h"
    return None


def _header_folders() -> list[Path]:
    """Where the compiler looks for Python.h. Source: triton/runtime/build.py and gcc's manual."""
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme names the folder for locally installed packages, which has no headers
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
