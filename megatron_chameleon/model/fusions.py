"""Which fused kernels a model uses on this machine: the one place that chooses.

A fusion runs by itself (``null`` in the config) only where it is known to pay.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    ``fusion_problems`` has refused it where it cannot run."""
    wanted = dataclasses.asdict(config.fusion)
    return Fusions(
        **{
            name: (name in KNOWN_TO_PAY and obstacle(name) is None)
            if wanted[name] is None
            else wanted[name]
            for name in NAMES
        }
    )


def fusion_problems(config: Config) -> Iterator[ConfigError]:
    """Fusions that the config demands and this machine cannot run."""
    for name in NAMES:
        if getattr(config.fusion, name) and (what := obstacle(name)):
            remedy = "Set it to null to have it where it can run, or to false"
            yield ConfigError(f"fusion.{name}", f"true {what}", remedy)


def obstacle(name: str) -> str | None:
    """What this machine lacks for a fusion, as the end of a sentence; None: nothing."""
    return _OBSTACLES[name]()


def _no_gpu() -> str | None:
    return None if platform.has_gpu() else "needs a GPU, and this machine has none"


def _no_transformer_engine() -> str | None:
    if no_gpu := _no_gpu():
        return no_gpu
    if platform.has_transformer_engine():
        return None
    return "needs Transformer Engine, and it cannot be imported here"


def _no_triton() -> str | None:
    if no_gpu := _no_gpu():
        return no_gpu
    if importlib.util.find_spec("triton"):
        return None
    return "needs the package triton, which is not installed"


_OBSTACLES: dict[str, Callable[[], str | None]] = {
    "apply_rope_fusion": _no_transformer_engine,
    "bias_dropout_fusion": _no_gpu,
    "bias_activation_fusion": _no_gpu,
    "gradient_accumulation_fusion": _no_transformer_engine,
    "loss_fusion": _no_triton,
    "qk_norm_rope_fusion": _no_triton,
}
