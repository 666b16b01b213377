"""Patterns of what is trained, and what is said about wrong ones."""

import pytest

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.model.tuning.selection import Selection, select_trained

HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def select(train: list[str], freeze: list[str] | None = None) -> Selection:
    """Of a model with 4 layers and 300 tokens, of which 4 to 35 are image codes."""
    config = Config(model=ModelConfig(train=train, freeze=freeze or []))
    return select_trained(config, 300, range(4, 36))


def test_rows() -> None:
    found = select(["lm_head[image]", "model.embed_tokens.weight[text]", "lm_head[290:]"])
    assert found.trained[HEAD] == ((4, 36), (290, 300))
    assert found.trained[EMBEDDING] == ((0, 4), (36, 300))
    assert found.trained_count == (42 + 268) * 128
    assert select(["lm_head"], ["lm_head[image]"]).trained[HEAD] == ((0, 4), (36, 300))


def test_modules_and_globs() -> None:
    assert select([]).is_everything and select([]).rows(HEAD) is None
    assert select(["model"]).trained[HEAD] == ()
    found = select(["model.layers.[0-1]", "*.q_norm"], ["*.mlp"])
    names = {name for name, ranges in found.trained.items() if ranges}
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in names
    assert "decoder.layers.3.self_attention.q_layernorm.bias" in names
    assert not any(
        "mlp.linear" in name or ".layers.2.self_attention.linear" in name for name in names
    )
    assert "decoder.layers.self_attention.linear_qkv.weight" in found.split_stacks
    assert "decoder.layers.self_attention.q_layernorm.bias" not in found.split_stacks


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("q_proj", "Did you mean *.q_proj?"),
        ("lm_heads", "Did you mean lm_head?"),
        ("output_layer", "Did you mean lm_head?"),
        ("decoder.layers.3.mlp.linear_fc1", "gate_proj and model.layers.*.mlp.up_proj?"),
        ("model.layers.9", "whose 4 layers count from 0"),
        ("lm_head[img]", "ends with [img], which names no rows"),
        ("lm_head[5:3]", "the rows 5 to 3 of 300 tokens"),
        ("*.mlp[image]", "has no row per token"),
        ("model.vqmodel", "is never trained here. Remove it."),
        ("*.k_proj", "they are one tensor in training. Name them together"),
        ("", "matches no tensor"),
    ],
)
def test_wrong_patterns(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select([pattern])
    assert said in str(caught.value)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing would be trained"):
        select([], ["*"])
    with pytest.raises(ConfigError, match="freezes all that"):
        select(["lm_head"], ["lm_head"])
