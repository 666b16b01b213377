"""What a run says about how much it trains."""

import pytest

from megatron_chameleon.config.finetuning import AdapterConfig
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.model.tuning.amount import describe_parameters


def describe(model: ModelConfig, **adapter: object) -> str:
    config = Config(model=model, adapter=AdapterConfig(**adapter))
    return describe_parameters(config, 300, range(4, 36))


def test_a_part_of_the_model() -> None:
    text = "trains 4,096 of 870,528 parameters (0.47%): lm_head[image]"
    assert describe(ModelConfig(train=["lm_head[image]"])) == text
    text = "trains 832,128 of 870,528 parameters (95.59%): everything except model.embed_tokens"
    assert describe(ModelConfig(freeze=["model.embed_tokens"])) == text
    assert describe(ModelConfig()) == describe(ModelConfig(train=["*"])) == "870,528 parameters"


@pytest.mark.parametrize(
    ("adapter", "added", "said"),
    [
        # 4 layers, of width 128 and 384: A [rank, in] and B [out, rank]
        (
            {"rank": 8, "target_modules": ["v_proj", "q_proj"]},
            4 * 2 * 8 * (128 + 128),
            "a LoRA adapter of rank 8 beside q_proj and v_proj",
        ),
        (
            {"rank": 2, "target_modules": ["down_proj"], "dora": True},
            4 * (2 * (384 + 128) + 128),
            "a DoRA adapter of rank 2 beside down_proj",
        ),
        (
            {"rank": 1},
            4 * (4 * 256 + 3 * 512),
            "a LoRA adapter of rank 1 beside 7 linear layers of each transformer layer",
        ),
    ],
)
def test_an_adapter(adapter: dict[str, object], added: int, said: str) -> None:
    model = ModelConfig(ffn_hidden_size=384)
    total = count_parameters(model, 300) + added
    share = 100 * added / total
    assert describe(model, **adapter) == (
        f"trains {added:,} of {total:,} parameters ({share:.2f}%): {said}"
    )
