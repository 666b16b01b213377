"""Check which fused kernels fit the rest of a config, on whatever machine.

``model/fusions.py`` says what a machine lacks for them.
"""

from collections.abc import Iterator

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def check_fusions(config: Config) -> Iterator[ConfigError]:
    """Fusions that the config demands but that cannot work with the rest of it."""
    for name, (what, remedy) in fusion_conflicts(config).items():
        if getattr(config.fusion, name):
            yield ConfigError(f"fusion.{name}", f"true {what}", remedy)


def fusion_conflicts(config: Config) -> dict[str, tuple[str, str]]:
    """Fusions that cannot work with the rest of the config.

    Returns:
        For each name, the end of a sentence that says why, and what to do.
    """
    found = {}
    if config.engine.name == "deepspeed":
        found["gradient_accumulation_fusion"] = (
            "adds to megatron-core's gradient buffers, but the deepspeed engine has its own",
            "Set it to null or false, or engine.name=megatron",
        )
    elif config.fp8.format is not None and config.fp8.emulate:
        found["gradient_accumulation_fusion"] = (
            "needs Transformer Engine's layers, but fp8.emulate has layers of its own",
            "Set it to null or false, or fp8.emulate=false",
        )
    if config.model.qk_norm_groups == 0:
        found["qk_norm_rope_fusion"] = (
            "fuses the QK-norm, which model.qk_norm_groups 0 leaves out",
            "Set it to null or false; apply_rope_fusion fuses only the rotary embedding",
        )
    elif config.fusion.qk_norm_rope_fusion:
        found["apply_rope_fusion"] = (
            "has no effect, because qk_norm_rope_fusion applies the rotary embedding too",
            "Set one of the two to null or false",
        )
    return found
