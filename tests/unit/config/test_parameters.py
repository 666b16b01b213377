"""Parameter counts agree with the paper's sizes and with what transformers builds."""

from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import ModelConfig

VOCAB_SIZE = 65_536


def preset(name: str, folder: Path) -> ModelConfig:
    path = folder / "config.yaml"
    path.write_text(f"preset: {name}\n")
    return load_config(path).model


def test_the_7b_is_the_released_one_to_the_last_parameter(tmp_path: Path) -> None:
    assert count_parameters(preset("chameleon_7b", tmp_path), VOCAB_SIZE) == 7_013_158_912


def test_the_34b(tmp_path: Path) -> None:
    count = count_parameters(preset("chameleon_34b", tmp_path), VOCAB_SIZE)
    assert count == pytest.approx(34.29e9, rel=1e-3)  # as precisely as it is known


@pytest.mark.parametrize("qk_norm_groups", [0, 1, 2, None])
@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_the_formula_counts_what_transformers_builds(
    qk_norm_groups: int | None, norm_order: str
) -> None:
    from transformers import ChameleonConfig
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonDecoderLayer,
        ChameleonSwinDecoderLayer,
    )

    model = ModelConfig(num_query_groups=2, norm_order=norm_order, qk_norm_groups=qk_norm_groups)
    layer_class = ChameleonSwinDecoderLayer if norm_order == "swin" else ChameleonDecoderLayer
    layer = layer_class(
        ChameleonConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
        ),
        0,
    )
    # transformers stores a QK-norm weight and bias for every head, we store one per group
    norms = sum(p.numel() for n, p in layer.named_parameters() if "_norm." in n)
    per_layer = sum(p.numel() for p in layer.parameters()) - norms
    head_size = model.hidden_size // model.num_attention_heads
    q_groups = 4 if qk_norm_groups is None else qk_norm_groups
    per_layer += 2 * head_size * (q_groups + min(q_groups, 2))
    rest = 2 * VOCAB_SIZE * model.hidden_size + model.hidden_size
    assert count_parameters(model, VOCAB_SIZE) == model.num_layers * per_layer + rest
