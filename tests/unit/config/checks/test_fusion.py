"""Fusions that the rest of a config rules out."""

import pytest

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.errors import ConfigErrors


def good() -> Config:
    config = Config()
    config.tokenizer.path = "tokenizer"
    config.data.stage1 = [SourceConfig(prefix="data")]
    return config


def problems(config: Config) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        check_config(config, 1)
    return caught.value.lines()


def test_fused_gradients_need_the_megatron_engine() -> None:
    config = good()
    config.engine.name = "deepspeed"
    check_config(config, 1)
    config.fusion.gradient_accumulation_fusion = True
    assert problems(config) == [
        "fusion.gradient_accumulation_fusion: true adds to megatron-core's gradient buffers, but "
        "the deepspeed engine has its own. Set it to null or false, or engine.name=megatron."
    ]


def test_fused_gradients_need_transformer_engines_layers() -> None:
    config = good()
    config.model.ffn_hidden_size = 352
    config.fp8.format, config.fp8.emulate = "hybrid", True
    config.fusion.gradient_accumulation_fusion = True
    (line,) = problems(config)
    assert line == (
        "fusion.gradient_accumulation_fusion: true needs Transformer Engine's layers, but "
        "fp8.emulate has layers of its own. Set it to null or false, or fp8.emulate=false."
    )
    config.fp8.emulate = False
    check_config(config, 1)


def test_the_rotary_embedding_is_applied_once() -> None:
    config = good()
    config.fusion.qk_norm_rope_fusion = True
    check_config(config, 1)
    config.fusion.apply_rope_fusion = True
    assert problems(config) == [
        "fusion.apply_rope_fusion: true has no effect, because qk_norm_rope_fusion applies the "
        "rotary embedding too. Set one of the two to null or false."
    ]


def test_without_a_qk_norm_there_is_none_to_fuse() -> None:
    config = good()
    config.fusion.qk_norm_rope_fusion = True
    config.model.qk_norm_groups = 0
    (line,) = problems(config)
    assert line.startswith("fusion.qk_norm_rope_fusion: true fuses the QK-norm, which model.qk_nor")
    assert line.endswith("apply_rope_fusion fuses only the rotary embedding.")
