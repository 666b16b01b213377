"""Which fused kernels fit the rest of a config, wherever it runs.

What a machine lacks for them is ``model/fusions.py``'s to say.
"""

from collections.abc import Iterator

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def check_fusions(config: Config) -> Iterator[ConfigError]:
    """Fusions that the config demands and that cannot work with the rest of it."""
    for name, (what, remedy) in fusion_conflicts(config).items():
        if getattr(config.fusion, name):
            yield ConfigError(f"fusion.{name}", f"true {what}", remedy)


def fusion_conflicts(config: Config) -> dict[str, tuple[str, str]]:
    """Fusions that cannot work with the rest of the config: for each the end of a sentence that
    says why, and what to do."""
    found = {}
    if config.engine.name == "deepspeed":
        found["gradient_accumulation_fusion"] = (
            "adds to megatron-core's gradient buffers, and the deepspeed engine has its own",
            "Set it to null or false, or engine.name=megatron",
        )
    elif config.fp8.format is not None and config.fp8.emulate:
        found["gradient_accumulation_fusion"] = (
            "is done by Transformer Engine's layers, and fp8.emulate has layers of its own",
            "Set it to null or false, or fp8.emulate=false",
        )
    if config.model.qk_norm_groups == 0:
        found["qk_norm_rope_fusion"] = (
            "fuses the QK-norm, which model.qk_norm_groups 0 leaves out",
            "Set it to null or false; apply_rope_fusion fuses the rotary embedding alone",
        )
    elif config.fusion.qk_norm_rope_fusion:
        found["apply_rope_fusion"] = (
            "has no work: qk_norm_rope_fusion true applies the rotary embedding in its own kernel",
            "Set one of the two to null or false",
        )
    return found
